"""What the compiler knows about each operator: one `OpSpec` in the table of its family.

The families (`passes/rules/`, `passes/forms/`) import what their functions are written with, so the floors below them
cannot import the families. They look an operator up here, where the tables are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any

from torch._ops import OpOverload


@dataclass(frozen=True)
class OpSpec:
    """All facts about one operator; a fact that is left out has a safe meaning."""

    rule: Callable[..., Any] | None = None
    """What each rank does where an operand is split (partition). None: torch's definition of it is split instead, or
    the operands are gathered."""

    _: KW_ONLY

    form: Callable[..., Any] | None = None
    """Its normal form (normalize). None: it is in normal form."""

    flops: Callable[..., int] | None = None
    """FLOPs from the shapes of (result, *arguments) (cost). None: bound by memory."""

    free: bool = False
    """Whether it moves no memory (cost)."""

    dense: bool = False
    """Whether its operand must lie densely along the last dim, and not be conjugated or negated lazily (codegen): what
    a rank holds may lie in memory otherwise than what was captured."""

    pull_back: Callable[..., Any] | None = None
    """Which rows of the operands may give wanted rows of the result (trim). None: the same rows, with broadcasting."""

    row_wise: Callable[..., Any] | None = None
    """What it does to rows that a router selected (capture). None: a model that selects rows before it is refused."""


OPERATORS: dict[Any, OpSpec] = {}


@cache
def aliases(op: OpOverload) -> bool:
    """Whether a result may share memory with an operand, or an operand is written to."""
    arguments = op._schema.arguments  # pyright: ignore[reportPrivateUsage]
    return any(argument.alias_info is not None for argument in arguments)


_UNKNOWN = OpSpec()


def register(table: Mapping[Any, OpSpec]) -> None:
    """Add the table of one family. Raises `ValueError` if an operator is in two tables."""
    twice = [str(op) for op in table if op in OPERATORS]
    if twice:
        raise ValueError(f"operators in two tables: {', '.join(twice)}")
    OPERATORS.update(table)


def spec_of(op: Any) -> OpSpec:
    """The facts about an operator; of an unknown one, that there are none."""
    return OPERATORS.get(op, _UNKNOWN)
