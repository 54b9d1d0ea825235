"""Normal forms of operators; one file per family, each ending in the table of those that are rewritten into others.

An operator that is part of the normal form has its entry in `passes/rules/`, with its form if arguments are normalized.
"""

from __future__ import annotations

from ...ir.operators import register
from . import copies, reductions, slicing, views, windows

FAMILIES = (views, slicing, copies, reductions, windows)

for family in FAMILIES:
    register(family.TABLE)
