"""The normal form of every operator that has a simpler word; one file per family, each ending in its table."""

from __future__ import annotations

from typing import Any

from ..builder import Form
from . import copies, products, reductions, slicing, views, windows

FAMILIES = (views, slicing, copies, reductions, products, windows)

FORMS: dict[Any, Form] = {target: form for family in FAMILIES for target, form in family.TABLE.items()}
