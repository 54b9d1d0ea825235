"""Reads and writes by index along the split dim, and windows of rows as tensors (unfold, fold, grid_sample)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import evenly, split
from tests.properties import few, given

X = (3, 5, 6)
EVERY = (0, 1, 2)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[mask > 0] = 0.5
    return x


def masked_rows(x: Tensor, mask: Tensor, row: Tensor) -> Tensor:
    x = x.clone()
    x[mask > 0] = row
    return x


def masked_columns(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    x = x.clone()
    x[:, mask > 0] = rows
    return x


def put(x: Tensor, i: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[:, i] = values
    return x


torch.manual_seed(0)  # the values below are the same whatever was imported before
I4, I3 = integers(5, 4), torch.tensor([3, 0, -1])
CASES: dict[str, tuple[Any, list[Any], dict[int, tuple[int, ...]]]] = {
    "index_select": (lambda x, i: x.index_select(1, i), [X, I4], {0: EVERY, 1: (0,)}),
    "x[i]": (lambda x, i: x[i], [(5, 6), integers(5, 2, 4)], {0: (0, 1), 1: (0, 1)}),
    "x[:, i, j]": (lambda x, i, j: x[:, i, j], [X, I4, I4], {0: EVERY, 1: (0,), 2: (0,)}),
    "embedding": (lambda t, i: F.embedding(i, t), [(9, 4), integers(9, 2, 7)], {0: (0, 1), 1: (0, 1)}),
    "gather": (lambda x, i: x.gather(1, i), [X, integers(5, 3, 5, 6)], {0: EVERY, 1: EVERY}),
    "gather of fewer": (lambda x, i: x.gather(1, i), [X, integers(5, 2, 4, 5)], {0: EVERY, 1: EVERY}),
    "scatter": (lambda x, i, s: x.scatter(1, i, s), [X, integers(5, 3, 1, 6), (3, 1, 6)], {0: EVERY, 1: (0, 2)}),
    "scatter of a number": (lambda x, i: x.scatter(1, i, 1.0), [X, integers(5, 3, 2, 6)], {0: EVERY, 1: EVERY}),
    "scatter of fewer": (lambda x, i: x.scatter(1, i, 1.0), [X, integers(5, 2, 2, 4)], {0: EVERY, 1: EVERY}),
    "scatter that multiplies by a number": (
        lambda x, i: x.scatter(1, i, 3.0, reduce="multiply"), [X, integers(5, 3, 2, 6)], {0: EVERY, 1: EVERY}
    ),
    "scatter that adds a number to fewer": (
        lambda x, i: x.scatter(1, i, 3.0, reduce="add"), [X, integers(5, 2, 2, 4)], {0: EVERY, 1: EVERY}
    ),
    "scatter that multiplies": (
        lambda x, i, s: torch.ops.aten.scatter.reduce(x, 1, i, s, reduce="multiply"),
        [X, integers(5, 3, 1, 6), (3, 1, 6)], {0: EVERY, 1: (0, 2)},
    ),
    "scatter_add": (
        lambda x, i, s: x.scatter_add(1, i, s), [X, integers(5, 3, 4, 6), (3, 4, 6)], {0: EVERY, 1: EVERY, 2: EVERY}
    ),
    "scatter_reduce": (
        lambda x, i, s: x.scatter_reduce(1, i, s, "amax"), [X, integers(5, 3, 4, 6), (3, 4, 6)], {0: EVERY, 2: EVERY}
    ),
    "scatter_reduce without itself": (
        lambda x, i, s: x.scatter_reduce(1, i, s, "mean", include_self=False),
        [X, integers(5, 3, 4, 6), (3, 4, 6)], {0: EVERY, 2: EVERY},
    ),
    "index_add": (lambda x, i, s: x.index_add(1, i, s), [X, I4, (3, 4, 6)], {0: EVERY, 1: (0,), 2: EVERY}),
    "index_copy": (
        lambda x, i, s: x.index_copy(1, i, s), [X, torch.tensor([3, 0, 1]), (3, 3, 6)], {0: EVERY, 1: (0,), 2: EVERY}
    ),
    "index_fill": (lambda x, i: x.index_fill(1, i, 2.0), [X, torch.tensor([3, 0])], {0: EVERY, 1: (0,)}),
    "x[:, i] = y": (put, [X, I3, (3, 3, 6)], {0: EVERY, 1: (0,), 2: EVERY}),
    "x[:, i] = row": (put, [X, I3, (6,)], {0: EVERY, 2: (0,)}),
    "x[i] += y": (
        lambda x, i, y: x.index_put((i,), y, accumulate=True), [(5, 6), I4, (4, 6)], {0: (0, 1), 1: (0,), 2: (0, 1)}
    ),
    "x[i, j] = y": (
        lambda x, j, y: x.index_put((torch.arange(3)[:, None], j), y), [X, torch.tensor([3, 0, 1]), (3, 3, 6)],
        {0: EVERY, 2: EVERY},
    ),
    "x[mask] = number": (masked, [(3, 5), (3, 5)], {0: (0, 1), 1: (0, 1)}),
    "x[rows] = number": (masked, [X, (3,)], {0: EVERY, 1: (0,)}),
    "x[mask] = row": (masked_rows, [X, (3, 5), (6,)], {0: EVERY, 1: (0, 1), 2: (0,)}),
    "x[:, mask] = rows": (masked_columns, [X, (5,), (3, 1, 6)], {0: EVERY, 1: (0,), 2: (0, 2)}),
    "diagonal": (lambda x: x.diagonal(1, 1, 2), [(3, 5, 6)], {0: EVERY}),
    "diagonal below": (lambda x: x.diagonal(-2, 2, 0), [(4, 5, 6)], {0: EVERY}),
    "trace": (lambda x: x.trace(), [(5, 5)], {0: (0, 1)}),
    "roll of everything": (lambda x: x.roll(2), [X], {0: EVERY}),
    "negative pad": (lambda x: F.pad(x, (-1, 2, -1, -2)), [(2, 5, 6)], {0: EVERY}),
    "unfold": (lambda x: x.unfold(1, 3, 1), [(3, 6, 5)], {0: EVERY}),
    "unfold side by side": (lambda x: x.unfold(1, 2, 2).unfold(2, 2, 2), [(3, 7, 6)], {0: EVERY}),
    "im2col": (lambda x: F.unfold(x, 3, padding=1), [(2, 3, 6, 5)], {0: (0, 1, 2, 3)}),
    "im2col with steps": (lambda x: F.unfold(x, (2, 3), 2, 1, 2), [(2, 3, 8, 9)], {0: (0, 1, 2, 3)}),
    "col2im": (lambda x: F.fold(x, (6, 5), 3, padding=1), [(2, 27, 30)], {0: (0, 2)}),
    "col2im side by side": (lambda x: F.fold(x, (6, 4), 2, stride=2), [(2, 12, 6)], {0: (0, 2)}),
    "col2im with gaps": (lambda x: F.fold(x, (9, 5), 2, stride=2, dilation=2), [(2, 12, 8)], {0: (0,)}),
    "grid_sample": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), [(2, 3, 6, 5), (2, 4, 7, 2)],
        {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)},
    ),
    "grid_sample of a volume": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=True), [(1, 2, 4, 6, 5), (1, 3, 4, 7, 3)],
        {0: (1, 2, 3, 4), 1: (1, 2, 3, 4)},
    ),
}  # fmt: skip


def example(name: str) -> Example:
    function, inputs, promised = CASES[name]
    return Example(function, [x if isinstance(x, Tensor) else randn(*x) for x in inputs], promised)


@pytest.mark.parametrize("name", CASES)
@few
@given(data=st.data())
def test_reads_and_writes_by_index_are_split(name: str, data: st.DataObject) -> None:
    split_where_promised(data, example(name))


@pytest.mark.parametrize("name", CASES)
@few
@given(data=st.data())
def test_reads_and_writes_by_index_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    split_anywhere(data, example(name))


def test_a_fold_into_as_many_rows_as_ranks_is_split() -> None:
    result = split(lambda x: F.fold(x, (4, 3), 1), [randn(2, 5, 12)], {0: evenly(2, 12, 4)}, 4)
    assert "small" not in result.roles
