"""The bound: what it counts, and that it is never above the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpass.capture import capture
from fxpass.passes.cuts import WorldSizeError
from fxpass.plan import make_plan
from fxpass.strategy import Strategy
from tests.passes.test_random_networks import CHANNELS, Network, apply, blocks
from tests.properties import examples, given


class Convolutions(nn.Module):
    """One convolution, written twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu() - self.inner(x)


class TwoPrompts(nn.Module):
    """Attends to two prompts, with queries of its own for each, and blends the results by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, prompt: Tensor, other: Tensor) -> Tensor:
        one, two = (
            F.scaled_dot_product_attention(self.query(x), self.key(text), self.value(text)) for text in (prompt, other)
        )
        mask = torch.linspace(0, 1, x.shape[1])[None, :, None]
        return x + self.out(one * mask + two * (1 - mask))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Convolutions(), [torch.randn(1, 4, 8, 8)]),
        (TwoPrompts(), [torch.randn(1, 64, 16), torch.randn(1, 8, 16), torch.randn(1, 8, 16)]),
    ],
)
def test_work_that_a_model_repeats_counts_once(model: nn.Module, inputs: list[Any], ranks: int) -> None:
    made = make_plan(capture(model.eval(), *inputs), ranks, Strategy.of("sync"))
    assert ranks * 0.75 < made.bound <= ranks
    assert made.flops_total <= sum(made.flops_per_rank)


class Twice(nn.Module):
    """Blends two applications of each block to the same value."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        for block in self.network.blocks:
            x = apply(block, x, text, time).sin() + apply(block, x, text, time) + x
        return x


@examples(40)
@given(st.data())
def test_the_bound_of_a_random_network_is_at_most_the_number_of_ranks(data: st.DataObject) -> None:
    network = Twice(Network([data.draw(blocks(8, 8, 1)) for _ in range(data.draw(st.integers(1, 3)))], False)).double()
    inputs = [torch.zeros(s, dtype=torch.float64) for s in ((2, CHANNELS, 8, 8), (2, 5, CHANNELS), (2, 3))]
    ranks = data.draw(st.integers(2, 5), label="ranks")
    try:
        made = make_plan(capture(network.eval(), *inputs), ranks, Strategy.of("sync"))
    except WorldSizeError:
        return
    assert made.flops_total <= sum(made.flops_per_rank)
    assert made.bound <= ranks
