"""Step programs: what `put` and `get` leave to a runner equals today's lockstep, bit for bit, in every mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxpass
from fxpass.capture import Call
from fxpass.ir import comm
from fxpass.ir.step import ChannelSpec, StepProgram, verify_step
from fxpass.models.small import case
from fxpass.passes.lower_comm import lower_comm
from fxpass.runtime.executor import EXACT, Step
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import InProcessChannels, StepRunner, Tamper, run_in_turns
from fxpass.runtime.structure import WeightTable
from tests.runtime.plans import block, inputs

WORLD = 3
CPU = torch.device("cpu")
EXCHANGES = [("block", strategy) for strategy in ("sync", "no_sync", "separate_gn", "corrected_async_gn", "pcpp")]
EXCHANGES += [("unet_sd", "displaced"), ("unet_sd", "compressed"), ("sana", "displaced"), ("wan", "pcpp")]
#: exact (E) and displaced (D) steps, each with its pace
STEPS = [("E", 0.0), ("E", 0.0), ("D", 0.8), ("D", 1.3), ("D", 0.7), ("E", 0.0), ("D", 0.0), ("D", 1.0), ("D", 1.2)]


@cache
def planned(name: str, strategy: str) -> tuple[nn.Module, dict[str, Any], fxpass.Plan]:
    if name == "block":
        model: nn.Module = block()
        sample, timestep = inputs()
        given: dict[str, Any] = {"sample": sample, "timestep": timestep}
    else:
        model = case(name).build()
        given = case(name).inputs(rows=32, seed=3, module=model)
    return model, given, fxpass.plan(fxpass.capture(model, **given), world_size=WORLD, strategy=strategy)


def calls_of(name: str, strategy: str) -> list[tuple[Sequence[Tensor], Step]]:
    """Inputs that drift, and how each step is run."""
    model, given, plan = planned(name, strategy)
    key = "sample" if "sample" in given else "hidden_states"
    drift = torch.randn(given[key].shape, generator=torch.Generator().manual_seed(4))
    exact = plan.exact_steps is None
    steps = [EXACT if kind == "E" or exact else Step(0, False, pace) for kind, pace in STEPS]
    return [
        (Call.of(model, (), given | {key: given[key] + 0.1 * k * drift}).tensors, step) for k, step in enumerate(steps)
    ]


def both(one: list[list[Tensor]], other: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The outputs of two runs of one step, rank by rank."""
    return [pair for ours, theirs in zip(one, other, strict=True) for pair in zip(ours, theirs, strict=True)]


def weights_of(model: nn.Module, plan: fxpass.Plan) -> list[Tensor]:
    return WeightTable(model, list(plan.program.weights.values())).tensors()


@torch.no_grad()
def run_steps(name: str, strategy: str, tamper: Tamper | None = None) -> list[list[list[Tensor]]]:
    """The outputs of all ranks at every step, by step programs."""
    model, _, plan = planned(name, strategy)
    runners = [StepRunner(lower_comm(plan.graph, rank), CPU) for rank in range(WORLD)]
    channels = InProcessChannels(runners, tamper)
    fixed = dict(zip(plan.program.weights, weights_of(model, plan), strict=True)) | plan.program.constants
    found = []
    for tensors, step in calls_of(name, strategy):
        values = fixed | dict(zip(plan.program.inputs, tensors, strict=True))
        found.append(run_in_turns(runners, channels, [values] * WORLD, step))
    return found


@pytest.mark.parametrize(("name", "strategy"), EXCHANGES)
@torch.no_grad()
def test_step_programs_equal_lockstep_bit_for_bit_in_every_mode(name: str, strategy: str) -> None:
    model, _, plan = planned(name, strategy)
    weights = weights_of(model, plan)
    loaded = None
    for (tensors, step), found in zip(calls_of(name, strategy), run_steps(name, strategy), strict=True):
        loaded = loaded or LockstepExecutor(WORLD).load(plan, weights, tensors)
        expected = loaded.run_all(weights, tensors, step)
        assert all(torch.equal(a, b) for a, b in both(found, expected)), step


@pytest.mark.parametrize("strategy", ["displaced", "compressed", "pcpp"])
def test_corrupting_any_channel_changes_the_outputs(strategy: str) -> None:
    _, _, plan = planned("block", strategy)
    channels = lower_comm(plan.graph, 0)["exact"].channels
    assert len(channels) >= 5
    expected = run_steps("block", strategy)
    for number, spec in enumerate(channels):

        def corrupt(channel: int, i: int, src: int, dst: int, payload: Tensor, number: int = number) -> Tensor:
            return (payload + 1).to(payload.dtype) if channel == number else payload

        found = run_steps("block", strategy, corrupt)
        same = [torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in both(one, other)]
        assert not all(same), f"{spec.name} is not used"


@pytest.mark.parametrize(("name", "strategy"), [("block", "displaced"), ("block", "compressed")])
def test_all_modes_of_a_rank_have_one_state_and_one_list_of_channels(name: str, strategy: str) -> None:
    plan = planned(name, strategy)[2]
    channels: set[tuple[ChannelSpec, ...]] = set()
    for rank in range(WORLD):
        programs = lower_comm(plan.graph, rank)
        verify_step(programs)
        assert {tuple(p.state) for p in programs.values()} == {programs["exact"].state}
        channels.add(programs["exact"].channels)
    assert len(channels) == 1, "ranks have other channels"


def test_the_first_displaced_step_is_a_program_of_its_own_only_where_messages_differ() -> None:
    plain = lower_comm(planned("block", "displaced")[2].graph, 0)
    coded = lower_comm(planned("block", "compressed")[2].graph, 0)
    assert plain["first"] is plain["steady"]
    assert coded["first"] is not coded["steady"]


def edited(program: StepProgram, change: Any) -> dict[Any, StepProgram]:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    change(graph)
    return {program.mode: StepProgram(program.rank, program.mode, graph, program.channels, program.state)}


def _uses(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def _await_first(graph: fx.Graph) -> None:
    _uses(graph, comm.put)[0].prepend(_uses(graph, comm.get)[0])


def _put_twice(graph: fx.Graph) -> None:
    put = _uses(graph, comm.put)[0]
    with graph.inserting_after(put):
        graph.node_copy(put, lambda node: node)


def _ask_for_the_last(graph: fx.Graph) -> None:
    _uses(graph, comm.get)[0].update_arg(1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_await_first, "awaited before it is put"),
        (_put_twice, "twice put"),
        (_ask_for_the_last, "nothing is left from the last step"),
    ],
)
def test_the_verifier_refuses_a_broken_step(change: Any, message: str) -> None:
    program = lower_comm(planned("block", "sync")[2].graph, 0)["exact"]
    verify_step({"exact": program})
    with pytest.raises(AssertionError, match=message):
        verify_step(edited(program, change))


def test_a_displaced_first_step_is_refused() -> None:
    runner = StepRunner(lower_comm(planned("block", "displaced")[2].graph, 0), CPU)
    with pytest.raises(ValueError, match="first step of a context is exact"):
        runner.store.mode(Step(0, False))


def test_ranks_that_wait_for_each_other_are_an_error() -> None:
    model, _, plan = planned("block", "sync")
    program = lower_comm(plan.graph, 0)["exact"]

    def never_put(graph: fx.Graph) -> None:
        graph.erase_node(_uses(graph, comm.put)[0])

    runners = [StepRunner(edited(lower_comm(plan.graph, rank)["exact"], never_put), CPU) for rank in range(WORLD)]
    tensors, step = calls_of("block", "sync")[0]
    fixed = dict(zip(plan.program.weights, weights_of(model, plan), strict=True)) | plan.program.constants
    values: Mapping[str, Tensor] = fixed | dict(zip(plan.program.inputs, tensors, strict=True))
    everywhere: Sequence[Mapping[str, Tensor]] = [values] * WORLD
    with torch.no_grad(), pytest.raises(AssertionError, match=f"waits for another one, at {program.channels[0].name}"):
        run_in_turns(runners, InProcessChannels(runners), everywhere, step)
