"""Displaced steps of every rule: at rest they equal exact ones; in motion all ranks return the same, and numbers.

The tables of functions are those that the exact tests go through. Here each function is cut evenly along each dim that
its table promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.capture import capture
from fxpass.ir.program import exchanges_of
from fxpass.ir.strategy import Strategy
from fxpass.passes.displace import displace
from fxpass.passes.normalize import normalize
from fxpass.passes.partition import partition
from fxpass.passes.rules import RULES
from tests.passes import (
    test_random_networks,
    test_rules_along,
    test_rules_frames,
    test_rules_movement,
    test_rules_sums,
    test_rules_writing,
)
from tests.passes.displaced import PRESETS, captured, follow
from tests.passes.examples import Example, randn
from tests.passes.harness import Function, cut, evenly, split

COMPARES = "softmax where most is masked"  # what equals a maximum of now and one of then: nothing is left


def _tables() -> Iterator[tuple[str, Example]]:
    for name, function in test_rules_along.ALONG.items():
        yield name, Example(function, [randn(3, 5, 6)], {0: (0, 1, 2)})
    for name, function in test_rules_sums.REDUCTIONS.items():
        yield name, Example(lambda x, f=function: f(x, (1,), True), [randn(3, 5, 6)], {0: (0, 1, 2)})
    for name, (module, shape, dims) in test_rules_sums.norms().items():
        yield f"norm, {name}", Example(module.double(), [randn(*shape)], {0: dims})
    for name, (function, shapes, promised) in test_rules_sums.PRODUCTS.items():
        yield name, Example(function, [randn(*s) for s in shapes], promised)
    for name, (function, shape, dims) in (
        test_rules_frames.FRAMES | test_rules_movement.VIEWS | test_rules_movement.MIXED
    ).items():
        yield name, Example(function, [randn(*shape)], {0: dims})
    for name, (function, shapes, promised) in test_rules_movement.SLICING.items():
        yield name, Example(function, [randn(*s) for s in shapes], promised)
    for name in test_rules_movement.INDEXING:
        yield name, test_rules_movement.looked_up(name)
    for name in test_rules_writing.CASES:
        yield f"writing, {name}", test_rules_writing.example(name)
    for name, function in test_random_networks.OTHERS.items():
        yield f"others, {name}", Example(function, [randn(2, 4, 8, 6)], {0: (2, 3)})
    inputs = [randn(2, 6, 3), randn(2, 5, 3), randn(2, 5, 4)]
    yield "attention by hand", Example(test_rules_along.attention, inputs, {0: (0, 1), 1: (0, 1), 2: (0, 1)})


torch.manual_seed(0)  # the values below are the same whatever was imported before
EXAMPLES = dict(_tables())


@pytest.mark.parametrize("name", EXAMPLES)
def test_displaced_steps_of_a_rule_equal_exact_ones_on_equal_inputs_and_all_ranks_agree(name: str) -> None:
    example = EXAMPLES[name]
    places = [(i, dim, example.inputs[i].shape[dim]) for i, dims in example.promised.items() for dim in dims]
    program = captured(example.function, example.inputs)
    for place, dim, size in places:
        for world in range(2, min(size, 3) + 1):
            cuts, known = {place: evenly(dim, size, world)}, {}
            for preset in PRESETS:
                found = follow(example.function, example.inputs, cuts, world, preset, program, known)
                assert found.finite or name == COMPARES, f"input {place} cut along {dim} on {world} ranks, {preset}"


@pytest.mark.parametrize("name", ["softmax", "cumsum", "norm, instance", "others, bicubic"])
def test_displaced_steps_of_these_rules_use_stale_values(name: str) -> None:
    """So that the test above has something to show."""
    example = EXAMPLES[name]
    dim = {"cumsum": 1, "softmax": 1}.get(name, 2)
    found = follow(example.function, example.inputs, {0: evenly(dim, example.inputs[0].shape[dim], 2)}, 2, "stale_gn")
    assert found.stale
    assert found.moved


def scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.3 + 1, -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(torch.ones(2, 6, 6, dtype=q.dtype), q, k.mT, beta=0.5)
    weights = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -1e9).softmax(-1)
    return torch.bmm(weights.to(v.dtype), v)


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (2, 2)) for x in (q, k, v))
    weights = torch.einsum("bihc,bjhc->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def similar(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).relu() @ v


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.mT @ torch.ones(6, 3, dtype=q.dtype)).mT


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (scored, {("keys_values", "stale"): 2}),
        (masked, {("keys_values", "stale"): 2}),
        (spelled, {("keys_values", "stale"): 2}),
        (linear, {("sum", "stale"): 2}),  # of the softmax over tokens, and of the products
        (similar, {("realign", "sync"): 2}),
        (mixed, {("sum", "sync"): 1}),
    ],
)
def test_matrix_products_are_stale_only_in_attention(function: Any, expected: dict[tuple[str, str], int]) -> None:
    """Keys, values and sums over tokens may be old; what else a product does with an operand is not known."""

    def model(*inputs: Tensor) -> Tensor:
        return function(*(x.tanh() for x in inputs))  # every rank has all rows of an input

    inputs = [randn(2, 6, 4) for _ in range(3)]
    program = normalize(capture(Function(model), *inputs))
    layouts = {name: evenly(1, 6, 2) for name in program.inputs}
    graph = displace(partition(program.graph, 2, layouts, RULES), Strategy.of("stale_gn"), program.inputs, 2)
    found = Counter((each.role, each.fresh) for _, some in exchanges_of(graph) for each in some)
    del found["output", "sync"]
    assert found == expected
    for preset in PRESETS:
        follow(model, inputs, {i: evenly(1, 6, 2) for i in range(len(program.inputs))}, 2, preset)


def test_argmax_compares_fresh_values_only() -> None:
    """An old maximum is equal to none of the values now, so that no position would be found."""
    for function in (lambda x: x.argmax(1), lambda x: x.min(1)[1]):
        found = follow(function, [randn(3, 6)], {0: evenly(1, 6, 2)}, 2, "stale_gn")
        assert not found.stale
        assert not found.moved


@pytest.mark.parametrize("preset", ["sync", "displaced"])
def test_a_row_that_two_ranks_compute_is_one_ranks_in_all_outputs(preset: str) -> None:
    """They round it otherwise: one computes it alone, the other among others."""
    torch.manual_seed(0)
    join = torch.nn.Conv2d(8, 4, 1).double()
    rows = cut(2, (0, 4), (3, 8))
    for _ in range(4):
        follow(join, [randn(2, 8, 8, 4)], {0: rows}, 2, preset)
        follow(join, [randn(2, 8, 8, 4)], {0: cut(2, (3, 4), (0, 8))}, 2, preset)


class Gathered(torch.nn.Module):
    """Two ranks compute row 3; no rule can split the windows' reshapes, which are given all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            [
                test_random_networks.Pooled("conv", "nearest", []),
                test_random_networks.Windows(0),
                test_random_networks.Conv(1, 1, 1),
                test_random_networks.Windows(0),
            ]
        )

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text, time)
        return x


@pytest.mark.parametrize("preset", ["sync", "displaced"])
def test_a_row_that_two_ranks_compute_is_one_ranks_after_a_fallback(preset: str) -> None:
    torch.manual_seed(0)
    rows = cut(2, (0, 1), (1, 2), (2, 3), (3, 4), (3, 8))
    inputs = [randn(2, 4, 8, 4), randn(2, 5, 4), randn(2, 3)]
    follow(Gathered().double(), inputs, {0: rows}, 5, preset)
    split(Gathered().double(), inputs, {0: rows}, 5, exact=False)


@pytest.mark.parametrize("preset", ["sync", "displaced"])
def test_rows_that_every_rank_computes_are_one_ranks_in_all_outputs(preset: str) -> None:
    torch.manual_seed(0)
    join = torch.nn.Conv2d(8, 4, 1).double()
    inputs, rows = [randn(2, 8, 8, 4)], cut(2, (0, 5), (3, 8))
    follow(lambda x: join(x)[:, :, 3:5], inputs, {0: rows}, 2, preset)
    split(lambda x: x * join(x)[:, :, 4:5].sum(1, keepdim=True), inputs, {0: rows}, 2)
