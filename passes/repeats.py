"""Find what a model repeats, so that a compiler sees it once: the blocks of a `ModuleList`, between two exchanges."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby

from torch import fx

LEAST = 8  #: operators; shorter runs are not worth a function of their own
_NUMBER = re.compile(r"\d+")


def cut_at_repeats(nodes: Sequence[fx.Node], form: Callable[[Sequence[fx.Node]], Hashable]) -> list[list[fx.Node]]:
    """Cut a list of operators so that equal blocks become pieces of their own.

    A block is a run of operators within one numbered module (`blocks.3`, else `down.0.resnets.1`). It becomes a piece
    if another run is of the same form; the outermost such modules are taken. What lies between stays together.

    Args:
        form: of a run of operators; runs of equal form can share a function.
    """
    pieces: list[list[fx.Node]] = []
    joined = False  # whether the last piece is one that takes in what follows
    for run, repeated in _runs(list(nodes), 1, form):
        if joined and not repeated:
            pieces[-1] += run
        else:
            pieces.append(run)
        joined = not repeated
    return pieces


def _runs(
    nodes: list[fx.Node], depth: int, form: Callable[[Sequence[fx.Node]], Hashable]
) -> Iterator[tuple[list[fx.Node], bool]]:
    """The operators in runs, and whether each is one of several equal blocks."""
    runs = [(key, list(run)) for key, run in groupby(nodes, lambda node: _block(node, depth))]
    if nodes and all(key is None for key, _ in runs):
        yield nodes, False
        return
    forms = [form(run) if key is not None and len(run) >= LEAST else None for key, run in runs]
    count = Counter(each for each in forms if each is not None)
    for (_, run), found in zip(runs, forms, strict=True):
        if count[found] > 1:
            yield run, True
        else:
            yield from _runs(run, depth + 1, form)


def _block(node: fx.Node, depth: int) -> str | None:
    """The numbered module, at this depth of numbers, in which an operator lies; None if there is none."""
    parts = str(node.meta.get("path", "")).split(".")
    numbers = [i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)]
    return ".".join(parts[: numbers[depth - 1] + 1]) if len(numbers) >= depth else None
