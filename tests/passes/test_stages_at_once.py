"""Stages that work at once (law 4): each reads what the stages before it made at the last step."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxpass
from fxpass.capture import Call, capture
from fxpass.capture.structure import WeightTable
from fxpass.ir import ops
from fxpass.ir.comm import get, put
from fxpass.ir.program import calls, is_on
from fxpass.ir.step import EXACT, MODES, Step
from fxpass.ir.strategy import Strategy
from fxpass.ir.transfer import Transfer
from fxpass.make_plan import make_plan
from fxpass.models.small import case, output_tensors
from fxpass.passes.lower_comm import StepPrograms
from fxpass.plan import Plan
from fxpass.planning import Deal
from fxpass.runtime.lockstep import LockstepExecutor
from tests.passes.test_stages import blocks
from tests.runtime.plans import block, steps

AT_ONCE = Strategy.of("asyncdiff")
DISPLACED = Step(exact=False, pace=1.0)
STEPS = (EXACT, EXACT, DISPLACED, DISPLACED, DISPLACED, EXACT, DISPLACED)


def planned(program: Any, stages: int, patches: int = 1, strategy: Strategy = AT_ONCE, groups: int = 1) -> Plan:
    ranks = stages * patches * groups
    return make_plan(program, ranks, strategy, "cpu", groups=groups, deal=Deal.of(ranks, groups, None, None, stages))


def by_lockstep(plan: Plan, module: Any, given: Sequence[Call], modes: Sequence[Step]) -> list[list[Tensor]]:
    """The outputs of each step, the same bits on all ranks."""
    weights = WeightTable(module, list(plan.program.weights.values())).tensors()
    loaded = LockstepExecutor(plan.world_size, check=True).load(plan, weights, given[0].tensors)
    found: list[list[Tensor]] = []
    with torch.no_grad():
        for call, mode in zip(given, modes, strict=True):
            first, *others = loaded.run_all(weights, call.tensors, mode)
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
            found.append([each.clone() for each in first])
    return found


class ByHand:
    """Runs the stages of the unsplit model one by one, each with its own operators, on what the others have made.

    Args:
        sample: names of inputs; of the values that depend on them, stages know those of the last step.
    """

    def __init__(self, plan: Plan, module: Any, sample: Sequence[str]) -> None:
        self.plan = plan
        self.graph = plan.program.graph
        self.weights = WeightTable(module, list(plan.program.weights.values())).tensors()
        names = dict(zip(plan.program.input_paths, plan.program.inputs, strict=True))
        self.stages = {
            node: [stage for stage in range(plan.stages) if is_on(planned, stage)]
            for node, planned in paired(self.graph, plan.graph).items()
        }
        moving = {names[each] for each in sample}
        self.late: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.name in moving or any(each in self.late for each in node.all_input_nodes):
                self.late.add(node)
        self.last: dict[fx.Node, Any] = {}

    def step(self, call: Call, step: Step) -> list[Tensor]:
        given: dict[str, Any] = dict(zip(self.plan.program.inputs, call.tensors, strict=True))
        given |= dict(zip(self.plan.program.weights, self.weights, strict=True)) | self.plan.program.constants
        inputs = {node: given[node.name] for node in self.graph.nodes if node.op == "placeholder"}
        fresh = self._run(inputs, [*calls(self.graph)], {})
        made: dict[fx.Node, Any] = {}
        if step.exact:
            made = fresh
        else:
            for stage in range(self.plan.stages):
                own = [node for node in calls(self.graph) if stage in self.stages[node]]
                known = {node: self.last[node] if node in self.late else fresh[node] for node in calls(self.graph)}
                for node, value in self._run(inputs, own, known).items():
                    if node.op == "call_function" and node in own:
                        made.setdefault(node, value)  # the first stage that runs it made it
        self.last = made
        (output,) = self.graph.find_nodes(op="output")
        return [made[node] for node in output.args[0]]

    @torch.no_grad()
    def _run(self, inputs: dict[fx.Node, Any], own: Sequence[fx.Node], known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        values = {**known, **inputs}
        for node in own:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values


def paired(whole: fx.Graph, planned: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each operator of a program and its place in a plan of one patch, which has transfers between them."""
    found: dict[fx.Node, fx.Node] = {}
    outputs = [graph.find_nodes(op="output")[0].args[0] for graph in (whole, planned)]
    todo = list(zip(*outputs, strict=True))
    while todo:
        node, other = todo.pop()
        while other.target is operator.getitem and other.args[0].target is ops.wait:
            other = other.args[0].args[1][other.args[1]]
        if node in found:
            assert found[node] is other
            continue
        assert node.target == other.target
        if node.op == "call_function":
            found[node] = other
            todo += zip(node.all_input_nodes, other.all_input_nodes, strict=True)
    return found


def generation(name: str, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """A model of the small zoo, and calls with other samples and timesteps."""
    module = case(name).build()
    rows = 16 - 16 % case(name).multiple
    first = case(name).inputs(rows=rows, cols=rows, batch=1, module=module, seed=1)
    given: list[dict[str, Any]] = []
    for number in range(count):
        moved = dict(first)
        for key in ("sample", "hidden_states"):
            if key in moved:
                noise = torch.randn(moved[key].shape, generator=torch.Generator().manual_seed(number))
                moved[key] = moved[key] + 0.3 * noise
        moved["timestep"] = moved["timestep"] - number * 20
        given.append(moved)
    return module, given


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(("name", "sample"), [("unet_2d_resnet", "sample"), ("sd35", "hidden_states")])
def test_stages_read_what_earlier_stages_made_at_the_last_step(name: str, sample: str, stages: int) -> None:
    module, given = generation(name, len(STEPS))
    program = capture(module, **given[0])
    tensors = [Call.of(module, (), each) for each in given]
    plan = planned(program, stages)
    found = by_lockstep(plan, module, tensors, STEPS)
    reference = ByHand(plan, module, [sample])
    for i, (call, step) in enumerate(zip(tensors, STEPS, strict=True)):
        expected = reference.step(call, step)
        with torch.no_grad():
            whole = output_tensors(module(**given[i]))[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)
        off = ((found[i][0] - whole).abs().max() / whole.abs().max()).item()
        assert off < 1e-5 if step.exact else off > 1e-4


@pytest.mark.parametrize("name", ["unet_2d_resnet", "sd35"])
def test_no_stage_waits_for_another_while_it_works_on_the_sample(name: str) -> None:
    """What a displaced step awaits of the others is sent before work on the sample begins, but for the output."""
    module, given = generation(name, 1)
    plan = planned(capture(module, **given[0]), 4)
    awaited = 0
    for rank in range(4):
        program = StepPrograms(plan.graph, rank)["steady"]
        (sample,) = (node for node in program.graph.nodes if node.name in ("x_sample", "x_hidden_states"))
        works = False  #: on the sample
        already: set[Any] = set()
        after: set[fx.Node] = {sample}
        for node in calls(program.graph):
            if after.intersection(node.all_input_nodes) or (node.target is get and node.args[0] not in already):
                after.add(node)
            works |= node in after and node.target not in (get, put, operator.getitem)
            if node.target is put:
                already.add(node.args[1])
                spec = program.channels[node.args[1]]  # type: ignore[index]
                output = spec is program.channels[-1]
                sends = any(each.sends(spec.place(rank)) for each in spec.exchanges if isinstance(each, Transfer))
                assert spec.late or output or not sends or not works, f"rank {rank} begins before it puts {spec}"
            elif node.target is get and node.args[0] in already:
                spec = program.channels[node.args[0]]  # type: ignore[index]
                awaited += sum(each.received(spec.place(rank)) for each in spec.exchanges)
    said = sum(sum(plan.bytes_received(rank, exact=False, exposed=True).values()) for rank in range(4))
    whole = sum(sum(plan.bytes_received(rank).values()) for rank in range(4))
    assert awaited == said
    assert said < 0.5 * whole


class Observed(torch.nn.Module):
    """Blocks, of which the first is an output as well, by a view, and read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tanh(self.blocks[0](x) + timestep[:, None, None])
        x = first
        for each in self.blocks[1:]:
            x = x + torch.tanh(each(x))
        seen = first.view(2, 64, 2, 16)
        return x.view(2, 32, 2, 32) + seen.reshape(2, 32, 2, 32), seen


def test_outputs_are_of_this_step_also_where_later_stages_read_them() -> None:
    torch.manual_seed(0)
    module = Observed().eval()
    given = [Call.of(module, (torch.randn(2, 64, 32), torch.rand(2)), {}) for _ in range(4)]
    plan = planned(capture(module, *given[0].tensors), 3)
    found = by_lockstep(plan, module, given, (EXACT, DISPLACED, DISPLACED, DISPLACED))
    reference = ByHand(plan, module, ["x"])
    for i, call in enumerate(given):
        expected = reference.step(call, DISPLACED if i else EXACT)
        torch.testing.assert_close(found[i], expected)
        with torch.no_grad():
            whole = module(*call.tensors)
        torch.testing.assert_close(found[i][1], whole[1])  # the first stage has nothing to wait for
        assert torch.allclose(found[i][0], whole[0], atol=1e-5) == (not i)


def test_patches_of_a_stage_are_as_fresh_as_the_strategy_says() -> None:
    module, given = block(), [Call.of(block(), each, {}) for each in steps(len(STEPS), rows=32)]
    program = capture(module, *given[0].tensors)
    found = [by_lockstep(planned(program, 2, patches), module, given, STEPS) for patches in (1, 2)]
    torch.testing.assert_close(found[0], found[1])  # exchanges among patches are exact
    stale = Strategy.of("displaced")
    patched = [by_lockstep(planned(program, n, 2, stale), module, given, STEPS) for n in (1, 2)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*patched, strict=True))
    both = Strategy("both", "stale", "stale", "predicted", "stale", "stale", forecast=1.0, warmup_steps=1)
    mixed = by_lockstep(planned(program, 2, 2, both), module, given, STEPS)
    same = [torch.allclose(a[0], b[0], atol=1e-5) for a, b in zip(mixed, found[0], strict=True)]
    assert same == [True, True, True, False, False, True, True]  # the second stage is a step behind


def test_groups_of_samples_have_stages_that_work_at_once() -> None:
    options: dict[str, Any] = {"stages": 2, "strategy": "asyncdiff", "warmup_steps": 1, "executor": "lockstep"}
    one, two = fxpass.parallelize(block(), 2, **options), fxpass.parallelize(block(), 4, cfg=2, **options)
    for call in steps(4):
        torch.testing.assert_close(two(*call), one(*call))


def test_generations_know_nothing_of_each_other() -> None:
    made: list[Any] = [
        fxpass.parallelize(block(), 2, stages=2, strategy="asyncdiff", warmup_steps=1, executor="lockstep")
        for _ in range(3)
    ]
    calls_of = [steps(5, seed=seed) for seed in (1, 2)]
    times = [float(each[1]) for each in calls_of[0]]
    apart: list[list[Tensor]] = []
    for one, each in zip(made, calls_of, strict=False):
        with one.generation(times):
            apart.append([one(*call)["sample"] for call in each])
    mixed: list[list[Tensor]] = [[], []]
    generations = [made[2].generation(times) for _ in range(2)]
    for pair in zip(*calls_of, strict=True):
        for i, call in enumerate(pair):
            with generations[i]:
                mixed[i].append(made[2](*call)["sample"])
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(mixed[i], apart[i], strict=True)), i
        assert not torch.allclose(mixed[i][1], block()(*calls_of[i][1])["sample"])  # the last three are exact


def test_what_a_rank_keeps_of_stages_is_counted() -> None:
    module, given = generation("sd35", 1)
    plan = planned(capture(module, **given[0]), 3)
    for rank in range(3):
        programs = StepPrograms(plan.graph, rank)
        own = {spec for mode in MODES for spec in programs[mode].state}
        late = [spec for spec in programs.channels if spec.late]
        held = sum(each.received(spec.place(rank)) for spec in late for each in spec.exchanges if each.has(rank))
        assert plan.state_bytes_per_rank[rank] == sum(spec.bytes for spec in own) + held
    assert plan.state_bytes_per_rank == plan.state_bytes_by_channel["in one process"]
    kinds = {each.declared.fresh for each in plan.exchanges if isinstance(each.declared, Transfer)}
    assert kinds == {"sync", "stale", "frozen"}


def test_a_displaced_step_is_predicted_to_take_as_long_as_one_stage() -> None:
    module, args = blocks()
    plan = fxpass.plan(module, *args, world_size=4, stages=4, target="cpu", strategy="asyncdiff")
    staged = plan.predict()
    assert staged.steady is not None
    assert staged.steady.seconds < 0.5 * staged.exact.seconds
    assert staged.exact_steps == (2, 3)
    assert plan.bound > 2.5
    assert "never stale: this is an output" in plan.explain(plan.exchanges[-1].id)
