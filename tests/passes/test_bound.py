"""The bound: what it counts, and that it is never above the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxpass.capture import capture
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.passes.cost import flops
from fxpass.passes.cuts import WorldSizeError
from fxpass.passes.normalize import normalize
from fxpass.plan import Plan
from tests.passes.harness import Function
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


@torch.library.custom_op("fxpass_test::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class Projected(nn.Module):
    """A layer, and products by operators that have no rule."""

    def __init__(self, product: Any, count: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.product, self.count = product, count

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(self.count):
            x = self.product(x.sin(), self.layer.weight)
        return x


def planned(model: nn.Module, *inputs: Tensor) -> Plan:
    return make_plan(capture(model.eval(), *inputs), 2, Strategy.of("sync"))


def test_custom_operators_count_as_matrix_products_on_every_rank() -> None:
    made = planned(Projected(project, 1), torch.randn(1, 8, 64))
    assert made.flops_total == 2 * 2 * 8 * 64 * 64
    assert made.bound == pytest.approx(2 / 1.5)
    assert made.estimated == made.describe()["estimated"] == {"fxpass_test.project.default": 1}
    assert not made.uncounted
    assert "estimated  1 x fxpass_test.project.default, as matrix products" in str(made)


def test_a_model_whose_work_is_in_custom_operators_is_refused() -> None:
    """Thirteen projections beside one layer that is split: 2 ranks would be 1.04 times as fast."""
    with pytest.raises(WorldSizeError, match=r"93% of the work: .*project.*; run it on one rank.*1\.04x"):
        planned(Projected(project, 13), torch.randn(1, 8, 64))


@torch.library.custom_op("fxpass_test::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@scale.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_custom_operators_that_cannot_be_matrix_products_are_named_as_not_counted() -> None:
    made = planned(Projected(lambda x, weight: scale(x, weight.mean(0)), 3), torch.randn(1, 8, 64))
    assert made.uncounted == made.describe()["uncounted"] == {"fxpass_test.scale.default": 3}
    assert not made.estimated
    assert "3 x fxpass_test.scale.default: its work is unknown" in str(made)


def test_work_that_is_gathered_counts_as_replicated() -> None:
    packed, scales = torch.zeros(64, 32, dtype=torch.uint8), torch.ones(2, 64, 2)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, 1), packed, 32, scales)[None]

    made = planned(Projected(product, 1), torch.randn(1, 8, 64))
    assert not made.uncounted
    assert made.flops_total == 2 * 2 * 8 * 64 * 64
    assert made.bound == pytest.approx(2 / 1.5)
    with pytest.raises(WorldSizeError, match=r"75% of the work: aten._weight_int4pack_mm_for_cpu.default gets whole"):
        planned(Projected(product, 3), torch.randn(1, 8, 64))


def test_work_of_an_operator_without_a_formula_is_that_of_its_parts() -> None:
    weight = torch.randn(16, 16)
    made = planned(Function(lambda x: torch.tensordot(x.sin(), weight, 1)), torch.randn(1, 12, 16))
    assert made.flops_total == sum(made.flops_per_rank) == 2 * 12 * 16 * 16


def test_an_operator_whose_parts_are_unknown_is_not_counted_where_it_is_gathered() -> None:
    weight = torch.randn(16, 16)
    made = planned(Function(lambda x: torch.linalg.svd(x @ weight)[1].sort(1)[0]), torch.randn(1, 12, 16))
    assert made.uncounted == {"aten.linalg_svd.default": 1}


PRODUCTS: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(3, 5, 4), (6, 4)]),
    "mm": (lambda x, w: x @ w, [(5, 4), (4, 6)]),
    "bmm": (torch.bmm, [(3, 5, 4), (3, 4, 6)]),
    "addmm": (torch.addmm, [(6,), (5, 4), (4, 6)]),
    "baddbmm": (torch.baddbmm, [(3, 5, 6), (3, 5, 4), (3, 4, 6)]),
    "einsum": (lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), [(2, 3, 5, 4), (2, 3, 7, 4)]),
    "einsum of one operand": (lambda x: torch.einsum("abc->ac", x), [(2, 3, 5)]),
    "convolution": (lambda x, w: F.conv2d(x, w, stride=2, groups=2), [(3, 4, 9, 7), (6, 2, 3, 3)]),
    "transposed convolution": (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(3, 4, 9, 7), (4, 6, 3, 2)]),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_work_is_what_torch_counts(name: str) -> None:
    function, shapes = PRODUCTS[name]
    inputs = [torch.randn(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    assert flops(normalize(capture(Function(function), *inputs)).graph) == counter.get_total_flops()
