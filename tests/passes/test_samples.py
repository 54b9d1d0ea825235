"""Samples of a batch are divided among groups of ranks where they are independent, and only there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpass.capture import capture
from fxpass.capture.structure import WeightTable
from fxpass.ir import ops
from fxpass.ir.layout import Layout, PerRank, even
from fxpass.ir.program import exchanges_of, shape_of
from fxpass.ir.strategy import Strategy
from fxpass.passes import Build, build, resume
from fxpass.passes.targets import find
from fxpass.plan import Plan
from fxpass.runtime.lockstep import LockstepExecutor
from tests.passes.harness import Function, assert_equal, refreshed
from tests.passes.test_random_networks import CHANNELS, OTHERS, Network, blocks
from tests.properties import examples, given

SYNC = Strategy()


def built(module: nn.Module, inputs: Sequence[Tensor], groups: int, patches: int = 1) -> Build:
    """Divide a batch among groups of ranks, whose first input is cut along dim 2; no more if it cannot be divided."""
    program = capture(module.eval(), *inputs)
    made = build(program, groups * patches, find("cpu"), SYNC, groups=groups, after="samples")
    if made.samples is None:
        return made
    name, dim = program.inputs[0], 2
    cuts = {name: Layout(dim, even(inputs[0].shape[dim], patches))} if patches > 1 else {}
    return resume(replace(made, cuts=cuts), after="cuts")


def ran(module: nn.Module, made: Build, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of all ranks, which check the shape of each value."""
    assert made.graph is not None
    plan = Plan(made.program, made.graph, made.world, SYNC, made.target, {}, {}, groups=made.mesh.groups)
    weights = WeightTable(module, list(plan.program.weights.values())).tensors()
    with torch.no_grad():
        return LockstepExecutor(made.world, check=True).load(plan, weights, inputs).run_all(weights, inputs)


def divided(module: nn.Module | Callable[..., Any], inputs: Sequence[Tensor], groups: int, patches: int = 1) -> Build:
    """Divide, run on fresh inputs, and compare with the whole; if not divided, the reason is in `mixed`."""
    module = module if isinstance(module, nn.Module) else Function(module)
    made = built(module, inputs, groups, patches)
    if made.samples is None:
        return made
    fresh = [refreshed(x) for x in inputs]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*fresh))
    first, *others = ran(module, made, fresh)
    assert_equal(first, expected, "outputs")
    for outputs in others:
        assert all(map(torch.equal, outputs, first)), "the ranks differ"
    return made


def independent(function: Callable[..., Tensor], x: Tensor) -> bool:
    """Whether each sample's result is what the function makes of that sample alone."""
    whole = function(x)
    return all(torch.allclose(function(x[i : i + 1]), whole[i : i + 1], atol=1e-9) for i in range(len(x)))


@pytest.mark.parametrize("name", OTHERS)
def test_each_family_of_operators_is_divided_exactly_if_it_treats_samples_by_themselves(name: str) -> None:
    x = torch.randn(4, CHANNELS, 8, 4, dtype=torch.float64)
    made = divided(OTHERS[name], [x], 2)
    alone = independent(OTHERS[name], x) and name != "added up"  # that makes an index of the first sample's shape
    assert (made.samples is not None) == alone, made.mixed
    if made.samples is not None:
        assert {each.role for _, declared in exchanges_of(made.current) for each in declared} == {"output"}


@examples(25)
@given(st.data())
def test_a_random_network_on_a_mesh_equals_the_whole_on_all_ranks(data: st.DataObject) -> None:
    height, width = data.draw(st.sampled_from([(8, 4), (8, 8), (12, 4)]), label="size")
    count = data.draw(st.integers(1, 3))
    network = Network([data.draw(blocks(height, width, 2)) for _ in range(count)], data.draw(st.booleans())).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    groups, patches = data.draw(st.integers(2, 3), label="groups"), data.draw(st.integers(1, 3), label="patches")
    batch = groups * data.draw(st.integers(1, 2), label="samples of a group")
    shapes = (batch, CHANNELS, height, width), (batch, 5, CHANNELS), (batch, 3)
    divided(network, [torch.randn(shape, dtype=torch.float64) for shape in shapes], groups, patches)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (lambda x: x.flip(0), "flip"),
        (lambda x: x - x.mean(0), "sum"),
        (lambda x: x.roll(1, 0), "roll"),
        (lambda x: x - x.amax((0, 2, 3), keepdim=True), "amax"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: x * torch.arange(4.0).view(4, 1, 1, 1).add(x[:1].mean()), "slice"),
        (lambda x: x.reshape(2, 2, *x.shape[1:]).sum(1, keepdim=True) + x.reshape(2, 2, *x.shape[1:]), "reshape"),
        (lambda x: torch.cat([x[2:], x[:2]]), "slice"),
        (lambda x: x[[1, 0, 3, 2]] * 2, "index"),
        (lambda x: torch.einsum("bchw,dchw->bd", x, x), "einsum"),
    ],
)
def test_samples_that_depend_on_each_other_are_not_divided_and_the_reason_names_the_operator(
    mix: Callable[[Tensor], Tensor], words: str
) -> None:
    def model(x: Tensor) -> Tensor:
        return mix(x.sin()) * 2

    made = divided(model, [torch.randn(4, 4, 8, 6)], 4)
    assert made.samples is None
    assert words in str(made.mixed), made.mixed
    assert made.mesh.patches == 4


class Guided(nn.Module):
    """A denoiser whose inputs have the batch in several places, and some by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.time = nn.Linear(6, 4)
        self.text = nn.Linear(5, 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, size: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        waves = t.expand(len(x))[:, None] * torch.arange(1.0, 7.0)
        y = self.mix(x) + self.time(waves.sin())[:, :, None, None] + self.text(text).mean(1)[:, :, None, None]
        ones = torch.ones(len(x), 1, 1, 1) * size[0] / size[1]
        return (y * ones * table[0].mean()).transpose(0, 1), size * 2


def guided(batch: int, samples_of_time: tuple[int, ...] = ()) -> list[Tensor]:
    x, text = torch.randn(batch, 4, 8, 6), torch.randn(batch, 7, 5)
    return [x, torch.rand(samples_of_time), text, torch.rand(2) + 1, torch.rand(batch, 3)]


def taken(made: Build) -> set[str]:
    """The inputs of which each group takes its samples."""
    assert made.samples is not None, made.mixed
    paths = dict(zip(made.program.inputs, made.program.input_paths, strict=True))
    return {paths[name] for name in made.samples.taken if name in paths}


def test_inputs_that_have_as_many_entries_as_the_batch_by_accident_stay_whole() -> None:
    model = Guided().eval()
    made = divided(model, guided(2), 2)
    assert made.samples is not None, made.mixed
    assert taken(made) == {"x", "text"}
    assert [layout.dim for layout in made.samples.results] == [1, None]


def test_a_timestep_is_divided_if_each_sample_has_its_own_and_otherwise_read_by_all() -> None:
    for shape in ((), (1,), (2,)):
        made = divided(Guided().eval(), guided(2, shape), 2)
        assert taken(made) == {"x", "text"} | ({"t"} if shape == (2,) else set())


def test_a_group_computes_what_depends_on_no_sample_once_and_the_rest_on_its_samples_alone() -> None:
    made = divided(Guided().eval(), guided(6), 3)
    assert made.samples is not None, made.mixed
    assert {shape_of(n)[0] for n in made.samples.program.graph.nodes if "convolution" in n.name} == {2}


def test_the_graph_of_all_ranks_shows_what_each_group_takes_and_one_gather_of_the_outputs() -> None:
    made = divided(Guided().eval(), guided(2), 2, 2)
    takes = [n for n in made.current.nodes if n.target is ops.take and isinstance(n.args[2], PerRank)]
    along = {n.args[0].name: n.args[2].axis.name for n in takes if n.args[2].axis}
    assert along == {"x_x": "samples", "x_text": "samples", "constant_ones_default": "samples"}
    axes = [(each.role, each.axis.name) for _, declared in exchanges_of(made.current) for each in declared]
    assert axes == [("output", "patches"), ("output", "samples")]


@pytest.mark.parametrize(
    ("batch", "groups", "words"),
    [(1, 2, "`x` has 1 sample, which 2 groups cannot share"), (3, 2, "`x` has 3 samples, which 2 groups cannot share")],
)
def test_a_batch_that_cannot_be_divided_evenly_is_not_divided(batch: int, groups: int, words: str) -> None:
    made = divided(Guided().eval(), guided(batch), groups)
    assert made.samples is None
    assert words in str(made.mixed)


def test_a_model_without_an_input_of_several_dims_is_not_divided() -> None:
    made = divided(lambda x: x.sin(), [torch.randn(4)], 2)
    assert made.samples is None
    assert "no input is known to have a batch dim" in str(made.mixed)


def test_a_model_whose_outputs_do_not_depend_on_the_batch_is_not_divided() -> None:
    made = divided(lambda x, y: y.sin(), [torch.randn(4, 3, 2), torch.randn(3)], 2)
    assert made.samples is None
    assert "does not depend on the batch" in str(made.mixed)


def test_values_without_elements_are_divided() -> None:
    """As the image tokens of a video model that is called without an image."""

    def model(x: Tensor, image: Tensor) -> Tensor:
        heads = image.unflatten(2, (2, 3)).transpose(1, 2)
        return torch.cat([x, heads.transpose(1, 2).flatten(2)], 1) * 2

    made = divided(model, [torch.randn(4, 5, 6), torch.randn(4, 0, 6)], 2)
    assert made.samples is not None, made.mixed


@pytest.mark.parametrize(("groups", "copies", "patches"), [(1, 2, 2), (2, 2, 1), (2, 2, 2), (1, 3, 1)])
def test_groups_that_do_the_same_give_all_ranks_the_bits_of_the_first(groups: int, copies: int, patches: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3, padding=1)).eval()
    x = torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    program = capture(module, x)
    cuts = {program.inputs[0]: Layout(2, even(8, patches))} if patches > 1 else {}
    world = groups * copies * patches
    made = build(program, world, find("cpu"), SYNC, groups=groups, copies=copies, cuts=cuts)
    assert (made.mesh.groups, made.mesh.patches) == (groups * copies, patches)
    first, *others = ran(module, made, [x])
    with torch.no_grad():
        assert_equal(first, [module(x)], "outputs")
    assert all(torch.equal(each, first[0]) for (each,) in others)
    assert made.graph is not None
    (gather,) = [e for _, message in exchanges_of(made.graph) for e in message if e.axis and e.axis.name == "samples"]
    sent = [sum(gather.numel(src, dst) for dst in range(gather.world)) > 0 for src in range(gather.world)]
    assert sent == [i % copies == 0 for i in range(groups * copies)]  # the others of a part are not heard
