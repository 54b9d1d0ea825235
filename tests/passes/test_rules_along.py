"""Operators along a dim that is split: softmax, running sums, argmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fxpass.ir.program import layout_of
from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import cut, evenly, split
from tests.properties import few, given

EVERY = (0, 1, 2)
ALONG: dict[str, Any] = {
    "softmax": lambda x: x.softmax(1),
    "softmax of large numbers": lambda x: (x * 300 + 1000).softmax(1),
    "softmax in another dtype": lambda x: x.float().softmax(1, dtype=torch.float64),
    "softmax with masked rows": lambda x: x.masked_fill(x < 0.3, -torch.inf).nan_to_num(neginf=-1e30).softmax(1),
    "softmax where most is masked": lambda x: torch.where(x == x.amax(1, keepdim=True), x, -torch.inf).softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "logsumexp of two dims": lambda x: x.logsumexp((1, 2), keepdim=True),
    "logsumexp of nothing": lambda x: torch.where(x > 9, x, -torch.inf).logsumexp(1),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum of booleans": lambda x: (x > 0).cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "cumsum backwards": lambda x: x.flip(1).cumsum(1).flip(1),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(1, keepdim=True),
    "argmax of equals": lambda x: (x > 0).long().argmax(1),
    "argmax of nan": lambda x: torch.where(x > 1, torch.nan, x).argmax(1),
    "max": lambda x: list(x.max(1)),
    "min": lambda x: list(x.min(1, keepdim=True)),
    "prod": lambda x: x.prod(1),
    "prod of everything": lambda x: x.prod(),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > -1).all(),
    "count_nonzero": lambda x: (x > 1).count_nonzero(1),
    "maxima of everything": lambda x: (x.max(), x.min()),
}


@pytest.mark.parametrize("name", ALONG)
@few
@given(data=st.data())
def test_operators_along_the_split_dim_need_no_fallback(name: str, data: st.DataObject) -> None:
    split_where_promised(data, Example(ALONG[name], [randn(3, 5, 6)], {0: EVERY}))


@pytest.mark.parametrize("name", ALONG)
@few
@given(data=st.data())
def test_operators_along_the_split_dim_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    split_anywhere(data, Example(ALONG[name], [randn(3, 5, 6)]))


@pytest.mark.parametrize("name", ALONG)
def test_a_row_that_several_ranks_hold_counts_once(name: str) -> None:
    split(ALONG[name], [randn(3, 5, 6)], {0: cut(1, (0, 5), (2, 4), (0, 5))}, 3)


def test_extreme_values_are_looked_for_among_the_rows_that_a_rank_owns() -> None:
    """Two ranks may round a row in different ways, of which only one equals the extreme value."""
    found = split(lambda x: (x * 3).argmax(1), [randn(3, 5, 6)], {0: cut(1, (0, 3), (2, 5))}, 2)
    (compared,) = found.graph.find_nodes(op="call_function", target=torch.ops.aten.eq.Tensor)
    assert [len(rows) for rows in layout_of(compared).rows] == [3, 2]


def test_a_running_sum_over_fewer_rows_than_ranks_is_gathered() -> None:
    rows = cut(1, (0, 1), (0, 2), (1, 2))
    found = split(lambda x: x.cumsum(1), [randn(3, 2, 6)], {0: rows}, 3, exact=False)
    assert found.fallbacks == ["aten.cumsum.default: fewer rows than ranks along dim 1"]


def test_a_softmax_over_the_split_dim_exchanges_two_numbers_a_row() -> None:
    result = split(lambda x: x.softmax(1), [randn(3, 8, 6)], {0: evenly(1, 8, 2)}, 2)
    assert result.roles == {"sum": 1, "output": 1}
    assert next(e for e in result.exchanges if e.role == "sum").received(0) == 2 * 3 * 6 * 8


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v)


@few
@given(data=st.data())
def test_attention_written_by_hand_is_split_along_queries_or_keys(data: st.DataObject) -> None:
    inputs = [randn(2, 6, 3), randn(2, 5, 3), randn(2, 5, 4)]
    split_where_promised(data, Example(attention, inputs, {0: (0, 1), 1: (0, 1), 2: (0, 1)}))


NEITHER: dict[str, Any] = {
    "sort": lambda x: list(x.sort(1)),
    "topk": lambda x: list(x.topk(3, 1)),
    "kthvalue": lambda x: list(x.kthvalue(2, 1)),
    "median": lambda x: list(x.median(1)),
    "cummax": lambda x: list(x.cummax(1)),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "glu": lambda x: F.glu(x, -1),
}
LAST: dict[str, Any] = {
    "sort": lambda x: list(x.sort()),
    "topk": lambda x: list(x.topk(3)),
    "kthvalue": lambda x: list(x.kthvalue(2)),
    "glu": F.glu,
}


@pytest.mark.parametrize("name", NEITHER)
@few
@given(data=st.data())
def test_operators_that_sort_along_one_dim_are_split_along_the_others(name: str, data: st.DataObject) -> None:
    split_where_promised(data, Example(NEITHER[name], [randn(3, 5, 6)], {0: (0, 2) if name != "glu" else (0, 1)}))
    split_anywhere(data, Example(NEITHER[name], [randn(3, 5, 6)]))


@pytest.mark.parametrize("name", LAST)
@few
@given(data=st.data())
def test_operators_that_are_given_no_dim_work_along_the_last(name: str, data: st.DataObject) -> None:
    split_where_promised(data, Example(LAST[name], [randn(3, 5, 6)], {0: (0, 1)}))
    split_anywhere(data, Example(LAST[name], [randn(3, 5, 6)]))
