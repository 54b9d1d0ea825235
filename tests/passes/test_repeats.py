"""What a model repeats becomes pieces of its own, which can share a compiled function."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import fx

from fxpass.passes.repeats import LEAST, cut_at_repeats


def nodes(*runs: tuple[str, str, int]) -> list[fx.Node]:
    """Operators: runs of (path, name of the operator, how many)."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    found = []
    for path, name, count in runs:
        for _ in range(count):
            value = graph.call_function(len, (value,))
            value.meta["path"] = path
            value.meta["name"] = name
            found.append(value)
    return found


def form(run: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(node.meta["name"] for node in run)


def cut(*runs: tuple[str, str, int]) -> list[int]:
    given = nodes(*runs)
    pieces = cut_at_repeats(given, form)
    assert [node for piece in pieces for node in piece] == given
    return [len(piece) for piece in pieces]


def test_equal_blocks_are_pieces_and_what_lies_between_stays_together() -> None:
    blocks = [(f"blocks.{k}.ff", "a", 10) for k in range(3)]
    assert cut(("embed", "e", 5), *blocks, ("norm", "n", 2), ("out.0", "o", 9)) == [5, 10, 10, 10, 11]


def test_blocks_that_differ_stay_together() -> None:
    assert cut(("down.0.conv", "a", 10), ("down.1.conv", "b", 10), ("up.0", "c", 10)) == [30]


def test_equal_blocks_within_unlike_ones_are_found() -> None:
    runs = [("down.0.resnets.0", "a", 9), ("down.0.resnets.1", "a", 9), ("down.0.pool", "p", 3)]
    assert cut(*runs, ("down.1.resnets.0", "b", 12), ("down.1.pool", "q", 3)) == [9, 9, 18]


def test_the_outermost_equal_modules_are_taken() -> None:
    inner = [(f"blocks.{k}.layers.{i}", "a", 10) for k in range(2) for i in range(3)]
    assert cut(*inner) == [30, 30]


@pytest.mark.parametrize("length", [LEAST - 1, LEAST])
def test_short_runs_are_not_worth_a_piece(length: int) -> None:
    runs = [("blocks.0", "a", length), ("blocks.1", "a", length)]
    assert cut(*runs) == ([2 * length] if length < LEAST else [length] * 2)


def test_nothing_is_cut_without_numbered_modules() -> None:
    assert cut(("", "a", 20), ("head.conv", "b", 20)) == [40]
    assert cut() == []
