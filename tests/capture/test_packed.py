"""Sequences of several lengths packed into one, in the styles that are usual: right for lengths that a guard fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fxpass.capture import Call, broken_guard, capture
from fxpass.capture.structure import WeightTable
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.runtime.lockstep import LockstepExecutor

LENGTHS, OTHERS = torch.tensor([5, 3, 8]), torch.tensor([4, 6, 6])
TOKENS, WIDTH = 16, 8

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  #: of q, k, v [1, 2, 16, 4] and lengths [3]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    ends = lengths.cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    parts = [
        F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return torch.cat(parts, 2)


def cut_up(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    parts = zip(*(x.split(lengths.tolist(), 2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)


def masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    ends = lengths.cumsum(0)
    of = torch.bucketize(torch.arange(q.shape[2]), ends, right=True)
    return F.scaled_dot_product_attention(q, k, v, of[:, None] == of[None])


def repeated(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return F.scaled_dot_product_attention(q, k, v, (of[:, None] == of[None])[None, None])


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    sizes = lengths.tolist()
    q, k, v = (
        pad_sequence([part.transpose(0, 1) for part in x[0].split(sizes, 1)], batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    )
    valid = torch.arange(max(sizes)) < lengths[:, None]
    y = F.scaled_dot_product_attention(q, k, v, valid[:, None, None])
    return y.transpose(1, 2)[valid].transpose(0, 1)[None]


class Packed(nn.Module):
    """A layer of attention between two of a kind that treat each token alone."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = attention

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.inside(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return x + self.outside(self.attention(q, k, v, lengths).transpose(1, 2).flatten(2))


def split(model: nn.Module, program: Any, call: Call, ranks: int) -> list[Tensor]:
    plan = make_plan(program, ranks, Strategy.of("sync"))
    assert not plan.fallbacks, plan.fallbacks
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    outputs = LockstepExecutor(ranks, check=True).load(plan, weights, call.tensors).run_all(weights, call.tensors)
    return [found for (found,) in outputs]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("attention", "guarded"),
    [(one_by_one, True), (cut_up, True), (masked, False), (repeated, False), (padded, True)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_packed_sequences_are_split_like_any(attention: Attention, guarded: bool, ranks: int) -> None:
    model = Packed(attention).eval()
    program = capture(model, torch.randn(1, TOKENS, WIDTH), LENGTHS)
    for lengths in (LENGTHS, OTHERS):
        x = torch.randn(1, TOKENS, WIDTH)
        call = Call.of(model, (x, lengths), {})
        if broken_guard(program, model, call.tensors) is not None:
            assert guarded
            assert lengths is OTHERS
            program = capture(model, torch.randn(1, TOKENS, WIDTH), lengths)
        else:
            assert lengths is LENGTHS or not guarded
        expected = model(x, lengths)
        for found in split(model, program, call, ranks):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
