"""Rules: one file per family of operators, each ending in its table. The tables are registered here."""

from __future__ import annotations

from typing import Any

from ...ir.operators import OPERATORS, register
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

for family in FAMILIES:
    register(family.TABLE)

RULES: dict[Any, Rule] = {op: spec.rule for op, spec in OPERATORS.items() if spec.rule is not None}
