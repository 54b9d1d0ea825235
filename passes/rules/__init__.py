"""One file per family of operators, each ending in its table; here they are joined into one."""

from __future__ import annotations

from typing import Any

from ..partition import Rule
from . import (
    along,
    attention,
    contractions,
    frames,
    indexing,
    normalization,
    patches,
    pointwise,
    reductions,
    resampling,
    slicing,
    views,
    windows,
    writing,
)

FAMILIES = (
    pointwise,
    views,
    slicing,
    indexing,
    writing,
    windows,
    frames,
    patches,
    resampling,
    normalization,
    reductions,
    along,
    contractions,
    attention,
)

RULES: dict[Any, Rule] = {target: rule for family in FAMILIES for target, rule in family.TABLE.items()}
