"""Normal forms: one file per family of operators, each ending in the table of those that are rewritten into others.

An operator that belongs to normal form has its entry in `passes/rules/`; its `form` there normalizes its arguments.
"""

from __future__ import annotations

from ...ir.operators import register
from . import copies, reductions, slicing, views, windows

FAMILIES = (views, slicing, copies, reductions, windows)

for family in FAMILIES:
    register(family.TABLE)
