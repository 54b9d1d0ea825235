"""What one rank writes into another's receive buffer, and how a copy becomes contiguous pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fxpass.runtime.pieces import LEAST, MOST, UNIT, pieces
from tests.properties import given


def run(table: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy byte by byte, as the kernel does."""
    here, there = (torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage()) for x in (source, target))
    for start, goal, size in table.tolist():
        there[goal : goal + size] = here[start : start + size]


@settings(deadline=None)
@given(st.data())
def test_pieces_copy_what_copy_copies(data: st.DataObject) -> None:
    shape = [*data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)), data.draw(st.sampled_from([8, 64, 72]))]
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.uint8]))

    def tensor(seed: int) -> Tensor:
        room = [n + data.draw(st.sampled_from([0, 0, 1, 8])) for n in shape]
        dims = order if data.draw(st.booleans()) else range(len(shape))
        whole = torch.empty_permuted(room, tuple(dims), dtype=dtype)
        whole.copy_(torch.randint(0, 99, room, generator=torch.Generator().manual_seed(seed)))
        for dim, n in enumerate(shape):
            whole = whole.narrow(dim, data.draw(st.integers(0, room[dim] - n)), n)
        return whole

    source, target = tensor(1), tensor(2)
    table = pieces(source, target)
    if table is None:
        return
    assert (table % UNIT == 0).all()
    assert (table[:, 2] <= MOST).all()
    assert table[:, 2].sum() == source.numel() * source.element_size()
    run(torch.from_numpy(table), source, target)
    assert torch.equal(target, source)


def test_a_contiguous_copy_is_cut_into_pieces_of_the_largest_size() -> None:
    source, target = torch.randn(2, 100, 640), torch.empty(2, 400, 640)[:, 100:200]
    table = pieces(source, target)
    assert table is not None
    assert len(table) == 2 * -(-100 * 640 * 4 // MOST)
    run(torch.from_numpy(table), source, target)
    assert torch.equal(source, target)


def test_small_or_unaligned_runs_have_no_pieces() -> None:
    x = torch.randn(4, 64)
    assert pieces(x.t(), torch.empty(64, 4)) is None
    assert pieces(x[:, : LEAST // 8], torch.empty(4, LEAST // 8)) is None
    assert pieces(x[:, 1:61], torch.empty(4, 60)) is None
    assert pieces(x[:, :32], torch.empty(4, 32)) is not None


def test_a_lazily_conjugated_or_negated_tensor_has_no_pieces() -> None:
    x, target = torch.randn(4, 64, dtype=torch.complex64), torch.empty(4, 64, dtype=torch.complex64)
    assert pieces(x, target) is not None
    assert pieces(x.conj(), target) is None
    assert pieces(x, target.conj()) is None
    assert pieces(torch._neg_view(torch.randn(4, 64)), torch.empty(4, 64)) is None


def test_short_runs_are_refused_before_the_pieces_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*_: object, **__: object) -> None:
        raise AssertionError("the pieces were listed")

    monkeypatch.setattr("numpy.arange", listed)
    assert pieces(torch.empty(64, 64), torch.empty(64, 64).t()) is None
