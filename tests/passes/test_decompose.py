"""Operators without a rule are decomposed into ones that have one, or gathered and split again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import evenly, split
from tests.properties import few, given

X = (3, 5, 6)
EVERY = (0, 1, 2)
torch.manual_seed(0)  # the values below are the same whatever was imported before
LSTM, GRU = (kind(4, 3, batch_first=True, bidirectional=True).double() for kind in (nn.LSTM, nn.GRU))
PARTS: dict[str, tuple[Any, list[tuple[int, ...]], dict[int, tuple[int, ...]]]] = {
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y, 1), [X, X], {0: EVERY, 1: EVERY}),
    "pairwise_distance": (F.pairwise_distance, [(5, 6), (5, 6)], {0: (0, 1), 1: (0, 1)}),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), [(2, 4, 5, 6)], {0: (0, 2, 3)}),
    "outer": (torch.outer, [(4,), (5,)], {0: (0,), 1: (0,)}),
    "kron": (torch.kron, [(4, 3), (3, 2)], {0: (0, 1), 1: (0, 1)}),
    "inner": (torch.inner, [(3, 5), (4, 5)], {0: (0, 1), 1: (0, 1)}),
    "dot": (torch.dot, [(6,), (6,)], {0: (0,), 1: (0,)}),
    "mv": (torch.mv, [(4, 5), (5,)], {0: (0, 1), 1: (0,)}),
    "addr": (torch.addr, [(4, 5), (4,), (5,)], {0: (0, 1), 1: (0,), 2: (0,)}),
    "tensordot": (lambda x, y: torch.tensordot(x, y, 2), [(3, 4, 5), (4, 5, 6)], {0: (0, 1, 2), 1: (0, 1, 2)}),
    "multi_dot": (lambda x, y: torch.linalg.multi_dot([x, y]), [(3, 4), (4, 5)], {0: (0, 1), 1: (0, 1)}),
    "matmul by a vector": (torch.matmul, [(2, 4, 5), (5,)], {0: (0, 1, 2), 1: (0,)}),
    "a weight that is split": (F.linear, [X, (4, 6), (4,)], {0: EVERY, 1: (0, 1), 2: (0,)}),
    "tril": (lambda x: x.tril(1), [X], {0: EVERY}),
    "triu": (lambda x: x.triu(), [X], {0: EVERY}),
    "diag_embed": (lambda x: x.diag_embed(), [(3, 5)], {0: (0, 1)}),
    "rot90": (lambda x: x.rot90(1, (1, 2)), [X], {0: EVERY}),
    "hstack": (lambda x, y: torch.hstack([x, y]), [X, X], {0: EVERY, 1: EVERY}),
    "tile": (lambda x: x.tile(2, 2), [X], {0: EVERY}),
    "meshgrid": (lambda x, y: torch.meshgrid(x, y, indexing="ij"), [(4,), (5,)], {0: (0,), 1: (0,)}),
    "fftshift": (lambda x: torch.fft.fftshift(x, (1, 2)), [X], {0: EVERY}),
    "isclose": (torch.isclose, [X, X], {0: EVERY, 1: EVERY}),
    "heaviside": (lambda x: torch.heaviside(x, x * 2), [X], {0: EVERY}),
    "prelu": (nn.PReLU(5).double(), [X], {0: EVERY}),
    "glu": (lambda x: F.glu(x, 1), [(3, 6, 4)], {0: EVERY}),
    "diff": (lambda x: x.diff(dim=1), [X], {0: EVERY}),
    "trapezoid": (lambda x: torch.trapezoid(x, dim=1), [X], {0: EVERY}),
    "nansum": (lambda x: torch.where(x > 1, torch.nan, x).nansum(1), [X], {0: EVERY}),
    "nanmean": (lambda x: torch.where(x > 1, torch.nan, x).nanmean(1), [X], {0: EVERY}),
    "renorm": (lambda x: x.renorm(2, 1, 1.0), [X], {0: (0, 1, 2)}),
    "lstm": (lambda x: LSTM(x)[0], [(2, 5, 4)], {0: (0, 1)}),
    "gru": (lambda x: GRU(x)[0], [(2, 5, 4)], {0: (0, 1)}),
    "block_diag": (torch.block_diag, [(3, 4), (2, 3)], {0: (0, 1), 1: (0, 1)}),
    "mse_loss": (lambda x, y: F.mse_loss(x, y, reduction="none"), [X, X], {0: EVERY, 1: EVERY}),
    "kl_div": (lambda x, y: F.kl_div(x, y.exp(), reduction="none"), [X, X], {0: EVERY, 1: EVERY}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
@few
@given(data=st.data())
def test_operators_without_a_rule_are_split_through_the_operators_they_consist_of(
    name: str, data: st.DataObject
) -> None:
    function, shapes, promised = PARTS[name]
    split_where_promised(data, Example(function, [randn(*s) for s in shapes], promised))


@pytest.mark.parametrize("name", PARTS)
@few
@given(data=st.data())
def test_operators_without_a_rule_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    function, shapes, _ = PARTS[name]
    split_anywhere(data, Example(function, [randn(*s) for s in shapes]))


def test_a_gathered_value_is_split_again_and_not_gathered_twice() -> None:
    result = split(lambda x: x.digamma().lgamma() + x, [randn(8, 5)], {0: evenly(0, 8, 2)}, 2, exact=False)
    assert result.layouts[0] == evenly(0, 8, 2)
    assert result.roles == {"fallback": 1, "output": 1}
