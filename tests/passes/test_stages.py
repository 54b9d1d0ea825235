"""Stages: the depth of a model is cut, and every stage runs a part with the weights of that part alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import Call, capture
from fxpass.ir import ops
from fxpass.ir.exchange import Exchange
from fxpass.ir.mesh import Mesh, Placement
from fxpass.ir.program import calls, exchanges_of, is_on
from fxpass.ir.strategy import Strategy
from fxpass.ir.transfer import Transfer
from fxpass.ir.verify import VerificationError, verify
from fxpass.make_plan import make_plan
from fxpass.models.small import case, cases
from fxpass.passes.lower_comm import StepPrograms
from fxpass.passes.stage_cuts import size_of
from fxpass.plan import Plan
from fxpass.planning import Deal
from tests.test_exact import EXACT, captured, error, outputs

FAST = ("unet_2d_resnet", "sd35")
LAYOUTS = ((2, 1), (4, 1), (2, 2), (4, 2))  #: (stages, patches)


def planned(program: Any, stages: int, patches: int = 1) -> Plan:
    ranks = stages * patches
    return make_plan(program, ranks, Strategy(), "cpu", deal=Deal.of(ranks, 1, None, None, stages))


@pytest.mark.parametrize(
    ("name", "stages", "patches"),
    [
        pytest.param(
            each.name, *layout, id=f"{each.name}-{layout[0]}x{layout[1]}",
            marks=() if each.name in FAST and layout in ((4, 1), (2, 2)) else pytest.mark.slow,
        )
        for each in cases
        for layout in LAYOUTS
    ],
)  # fmt: skip
def test_a_model_in_stages_equals_the_whole_one(name: str, stages: int, patches: int) -> None:
    rows = 16 - 16 % case(name).multiple
    module, program, call, expected = captured(name, rows, rows, 1)
    plan = planned(program, stages, patches)
    assert plan.mesh == Mesh(1, patches, stages)
    for found in outputs(plan, module, call):
        for ours, theirs in zip(found, expected, strict=True):
            assert error(ours, theirs) <= EXACT


@pytest.mark.parametrize("name", FAST)
def test_a_stage_names_no_weight_of_another(name: str) -> None:
    module, program, _, _ = captured(name, 16, 16, 1)
    plan = planned(program, 4, 2)
    holders: Counter[str] = Counter()
    sizes: list[int] = []
    for rank in range(0, 8, 2):
        own, other = (StepPrograms(plan.graph, each)["exact"].graph for each in (rank, rank + 1))
        named = {node.name for node in own.nodes if node.op == "placeholder" and node.name in program.weights}
        assert named == {n.name for n in other.nodes if n.op == "placeholder" and n.name in program.weights}
        assert all(any(True for _ in node.users) for node in own.nodes if node.name in named)
        assert len(named) < len(plan.program.weights)
        holders.update(named)
        sizes.append(sum(size_of(node) for node in plan.graph.nodes if node.name in named))
    assert set(holders) == set(plan.program.weights)
    assert sum(sizes) < 1.1 * sum(tensor.nbytes for tensor in module.state_dict().values())


def test_a_corrupted_transfer_changes_the_output() -> None:
    module, program, call, expected = captured("sd35", 16, 16, 1, 3**0.5)
    plan = planned(program, 3)
    declared = [each for _, some in exchanges_of(plan.graph) for each in some]
    assert declared
    assert all(isinstance(each, Transfer) for each in declared)
    for transfer in declared:

        def corrupt(node: str, at: Exchange, src: int, dst: int, x: Tensor, one: Exchange = transfer) -> Tensor:
            return torch.randn_like(x) if at is one else x

        found = outputs(plan, module, call, corrupt)
        assert any(error(a, b) > 1e-3 for rank in found for a, b in zip(rank, expected, strict=True)), transfer


class Blocks(nn.Module):
    """Blocks that a large projection of the timestep modulates, with a skip connection around all of them.

    The first of them may have more weights than the others, which do as much work.
    """

    def __init__(self, tied: bool = False, uneven: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 64)
        self.modulation = nn.ModuleList(nn.Linear(64, 32) for _ in range(8))
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.beside = nn.ModuleList(nn.Linear(32, 32) for _ in range(6 * uneven))
        if tied:
            self.blocks[7].weight = self.blocks[0].weight
        self.out = nn.Linear(64, 32)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        step = torch.sin(self.embed(timestep[:, None]))
        first = torch.relu(x)
        for modulate, block in zip(self.modulation, self.blocks, strict=True):
            x = x + torch.tanh(block(x) + modulate(step)[:, None])
            if self.beside and block is self.blocks[0]:
                for beside in self.beside:
                    x = x + torch.tanh(beside(x[:, :1]))
        return self.out(torch.cat([x, first], -1))


def blocks(**options: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Blocks(**options).eval(), (torch.randn(2, 64, 32), torch.rand(2))


def run(stages: int, patches: int = 1, **options: Any) -> tuple[Plan, Tensor, Tensor]:
    module, args = blocks(**options)
    program = capture(module, *args)
    plan = planned(program, stages, patches)
    found = outputs(plan, module, Call.of(module, args, {}))
    assert all(torch.equal(each[0], found[0][0]) for each in found)
    with torch.no_grad():
        return plan, found[0][0], module(*args)


def test_a_skip_connection_is_sent_once_and_the_output_to_all() -> None:
    plan, found, expected = run(3)
    torch.testing.assert_close(found, expected)
    on = {node.name: [rank for rank in range(3) if is_on(node, rank)] for node in calls(plan.graph)}
    (joined,) = plan.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert on[joined.name] == [2]
    rows = [each for _, some in exchanges_of(plan.graph) for each in some if each.shape == (2, 64, 32)]
    sent = [tuple(plan.mesh.stage(rank) for rank in each.axis.lines[0]) for each in rows if each.axis]
    assert sorted(sent) == [(0, 1), (0, 2), (1, 2), (2, 0, 1)]


def test_free_operators_run_where_they_are_read_and_large_ones_where_there_is_room() -> None:
    plan, found, expected = run(2, uneven=True)
    torch.testing.assert_close(found, expected)
    held = [0, 0]
    for node in plan.graph.nodes:
        if node.op == "placeholder" and node.name in plan.program.weights:
            for rank in (0, 1):
                held[rank] += size_of(node) * is_on(node, rank)
    assert max(held) < 0.55 * sum(held)
    back = [each for _, some in exchanges_of(plan.graph) for each in some if each.axis and each.axis.lines[0] == (1, 0)]
    assert [each.shape for each in back] == [(2, 32), (2, 64, 32)]  # a projection, and the output


def test_a_weight_that_two_stages_read_is_on_both() -> None:
    plan, found, expected = run(2, tied=True)
    torch.testing.assert_close(found, expected)
    (shared,) = [n for n in plan.graph.nodes if n.name in plan.program.weights and is_on(n, 0) and is_on(n, 1)]
    assert plan.program.weights[shared.name] in ("blocks.0.weight", "blocks.7.weight")


def test_more_stages_than_operators_are_refused_with_the_number_that_would_do() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
    program = capture(module, torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match=r"cannot be cut into 4 stages: .* stages=2 would do"):
        planned(program, 4)
    assert planned(program, 2).mesh.stages == 2


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stages": 0}, "stages must be a whole number of at least 1, not 0"),
    ({"stages": 2.0}, r"stages must be a whole number of at least 1, not 2\.0"),
    ({"stages": 3}, "the 4 processes cannot be divided evenly into 3 stages; stages=1 or 2 or 4 would do"),
    ({"stages": 4, "cfg": 2}, "the 2 processes of each group cannot be divided evenly into 4 stages"),
    ({"stages": 2, "patches": 3}, "3 patches cannot be dealt evenly to the 2 processes of each stage; 2 or 4 patches"),
    ({"strategy": "asyncdiff"}, r"strategy 'asyncdiff' lets the stages .* work at once, and stages=1: give stages=2"),
    ({"stages": 2, "strategy": "auto"}, "stages, patches and speeds are for a strategy that is named"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_stages_that_make_no_sense_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    module, args = blocks()
    with pytest.raises(ValueError, match=words):
        fxpass.parallelize(module, 4, executor="lockstep", **options)
    with pytest.raises(ValueError, match=words):
        fxpass.plan(module, *args, world_size=4, **options)


def test_stages_are_not_recorded_as_graphs() -> None:
    with pytest.raises(ValueError, match="cannot record the steps of stages as CUDA graphs"):
        fxpass.parallelize(blocks()[0], 2, executor="lockstep", stages=2, compile="graph")


@pytest.mark.parametrize(
    ("world", "options", "mesh"),
    [
        (4, {"stages": 4}, Mesh(1, 1, 4)),
        (2, {"stages": 2, "patches": 2}, Mesh(1, 2, 2)),
        (4, {"stages": 2, "cfg": 2}, Mesh(2, 1, 2)),
        (8, {"stages": 2, "cfg": 2}, Mesh(2, 2, 2)),
    ],
)
def test_stages_go_with_patches_and_groups(world: int, options: dict[str, Any], mesh: Mesh) -> None:
    module, args = blocks()
    parallel: Any = fxpass.parallelize(module, world, executor="lockstep", **options)
    with torch.no_grad():
        torch.testing.assert_close(parallel(*args), module(*args))
    assert parallel.plan.mesh == mesh
    each = mesh.world // world
    assert parallel.plan.placement == Placement((each,) * world)
    assert f"{mesh.stages} stages of {mesh.patches} patch" in str(parallel.plan)
    assert parallel.plan.bound <= mesh.groups * mesh.patches * 1.001


def test_a_saved_plan_has_its_stages(tmp_path: Any) -> None:
    module, args = blocks()
    made = fxpass.plan(module, *args, world_size=4, stages=2)
    made.save(tmp_path / "plans.json")
    with pytest.raises(ValueError, match="has no plan of this kind: it has world_size=4, strategy='sync', stages=2"):
        fxpass.parallelize(module, 4, executor="lockstep", plan=tmp_path / "plans.json", stages=4)
    parallel: Any = fxpass.parallelize(module, executor="lockstep", plan=tmp_path / "plans.json")
    with torch.no_grad():
        torch.testing.assert_close(parallel(*args), module(*args))
    assert parallel.plan.fingerprint == made.fingerprint


def test_values_must_be_where_operators_read_them() -> None:
    plan, _, _ = run(2)
    graph = plan.graph
    verify(graph, "scheduled", 1)
    moved = next(node for node in reversed(list(calls(graph))) if node.meta.get("placed") == (1,))
    moved.meta["placed"] = (0,)
    with pytest.raises(VerificationError, match="values are where operators read them"):
        verify(graph, "scheduled", 1)
    moved.meta["placed"] = (1,)
    launch = next(node for node, _ in exchanges_of(graph) if node.target is ops.exchange)
    launch.meta["placed"] = (0,)
    with pytest.raises(VerificationError, match="values are where operators read them"):
        verify(graph, "scheduled", 1)


def test_a_plan_in_stages_can_be_looked_at(tmp_path: Any) -> None:
    module, args = blocks()
    plan = fxpass.plan(module, *args, world_size=4, stages=2)
    for rank in range(4):
        shown = plan.snapshot(rank)
        assert {node.name for node in shown.nodes} == {n.name for n in plan.graph.nodes if is_on(n, rank)}
        found = [plan.explain(each.id, rank) for each in shown.exchanges]
        assert any("another stage of the model reads the value" in each for each in found)
    described = plan.describe()
    assert (described["mesh"], described["stages"]) == ([1, 2], 2)
    assert len(described["weights_per_process"]) == 4
    assert max(described["weights_per_process"]) < plan.weights
    with pytest.raises(NotImplementedError, match="transfers between stages have no ONNX form"):
        plan.to_onnx(tmp_path / "x.onnx")


def test_predictions_know_stages() -> None:
    module, args = blocks()
    one, two = (fxpass.plan(module, *args, world_size=n, stages=n, target="cpu").predict() for n in (1, 2))
    assert [len(each.memories) for each in (one, two)] == [1, 2]
    assert all(each.weights < 0.6 * one.memory.weights for each in two.memories)
    assert two.exact.seconds > one.exact.seconds > two.exact.compute
