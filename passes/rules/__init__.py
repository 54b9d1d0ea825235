"""One file per family of operators, each ending in its table; here they are joined into one."""

from __future__ import annotations

from typing import Any

from ..partition import Rule
from . import (
    attention,
    contractions,
    frames,
    indexing,
    normalization,
    pointwise,
    reductions,
    resampling,
    slicing,
    views,
    windows,
)

FAMILIES = (
    pointwise,
    views,
    slicing,
    indexing,
    windows,
    frames,
    resampling,
    normalization,
    reductions,
    contractions,
    attention,
)

RULES: dict[Any, Rule] = {target: rule for family in FAMILIES for target, rule in family.TABLE.items()}
