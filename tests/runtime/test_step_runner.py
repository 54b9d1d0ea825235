"""Step programs: what they promise, which mode a step has, and that every channel is used."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxpass
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir import comm
from fxpass.ir.exchange import Exchange
from fxpass.ir.step import EXACT, MODES, PACE, Step, StepProgram, verify_step
from fxpass.models.small import case
from fxpass.passes.codegen import step_code
from fxpass.passes.lower_comm import StepPrograms
from fxpass.runtime.channels import RankChannel, Tamper
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import ContextState, run_in_turns
from tests.runtime.plans import block, inputs

WORLD = 3
CPU = torch.device("cpu")
#: exact (E) and displaced (D) steps, each with its pace
STEPS = [("E", 0.0), ("E", 0.0), ("D", 0.8), ("D", 1.3), ("D", 0.7), ("E", 0.0), ("D", 0.0), ("D", 1.0), ("D", 1.2)]


@cache
def planned(name: str, strategy: str, rows: int = 32) -> tuple[nn.Module, dict[str, Any], fxpass.Plan]:
    if name == "block":
        model: nn.Module = block()
        sample, timestep = inputs()
        given: dict[str, Any] = {"sample": sample, "timestep": timestep}
    else:
        model = case(name).build()
        given = case(name).inputs(rows=rows, seed=3, module=model)
    return model, given, fxpass.plan(fxpass.capture(model, **given), world_size=WORLD, strategy=strategy)


def steps_of(name: str, strategy: str, tamper: Tamper | None = None) -> list[list[Any]]:
    """The outputs of all ranks at every step, on inputs that drift."""
    model, given, plan = planned(name, strategy)
    key = "sample" if "sample" in given else "hidden_states"
    drift = torch.randn(given[key].shape, generator=torch.Generator().manual_seed(4))
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    loaded, found = None, []
    for k, (kind, pace) in enumerate(STEPS):
        tensors = Call.of(model, (), given | {key: given[key] + 0.1 * k * drift}).tensors
        loaded = loaded or LockstepExecutor(WORLD, tamper=tamper).load(plan, weights, tensors)
        step = EXACT if kind == "E" or plan.exact_steps is None else Step(0, False, pace)
        with torch.no_grad():
            found.append(loaded.run_all(weights, tensors, step))
    return found


def flat(found: list[list[Any]]) -> list[Tensor]:
    return [output for step in found for rank in step for output in rank]


@pytest.mark.parametrize("strategy", ["displaced", "compressed", "pcpp"])
def test_corrupting_any_channel_changes_the_outputs(strategy: str) -> None:
    _, _, plan = planned("block", strategy)
    channels = StepPrograms(plan.graph, 0).channels
    assert len(channels) >= 5
    expected = flat(steps_of("block", strategy))
    for spec in channels:

        def corrupt(
            channel: str, exchange: Exchange, src: int, dst: int, payload: Tensor, name: str = spec.name
        ) -> Tensor:
            return (payload + 1).to(payload.dtype) if channel == name else payload

        found = flat(steps_of("block", strategy, corrupt))
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{spec.name} is not used"


@pytest.mark.parametrize("strategy", ["displaced", "compressed", "pcpp"])
def test_all_ranks_and_modes_have_one_list_of_channels_and_one_state(strategy: str) -> None:
    plan = planned("block", strategy)[2]
    seen = set()
    for rank in range(WORLD):
        programs = StepPrograms(plan.graph, rank)
        for mode in MODES:
            program = programs[mode]
            assert (program.channels, program.state) == (programs.channels, programs.state)
        seen.add(tuple((spec.name, spec.exchanges, spec.late) for spec in programs.channels))
    assert len(seen) == 1, "ranks have other channels"


def test_modes_share_a_program_where_nothing_tells_them_apart() -> None:
    modes = {
        name: {mode: StepPrograms(planned("block", name)[2].graph, 0).canonical(mode) for mode in MODES}
        for name in ("sync", "displaced", "compressed", "no_sync")
    }
    assert set(modes["sync"].values()) == {"exact"}
    assert modes["displaced"]["first"] == "steady"
    assert modes["displaced"]["first unpaced"] == "steady unpaced"  # it forecasts
    assert modes["compressed"]["first"] == "first"  # exact steps send values, displaced ones codes
    assert modes["no_sync"]["steady unpaced"] == modes["no_sync"]["steady"]


def test_the_mode_of_a_step_follows_from_the_steps_before() -> None:
    history = ContextState()
    with pytest.raises(ValueError, match="first step of a context is exact"):
        history.next(Step(0, exact=False))
    given = [("E", 0.0), ("D", 1.0), ("D", 1.0), ("D", 0.0), ("E", 1.0), ("D", 1.0), ("E", 0.0), ("D", 0.0)]
    modes = [history.next(Step(0, kind == "E", pace)) for kind, pace in given]
    assert modes == [
        *("exact", "first unpaced", "steady", "steady unpaced"),
        *("exact", "first", "exact", "first unpaced"),
    ]


def _edited(program: StepProgram, change: Any) -> StepProgram:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    change(graph)
    return StepProgram(program.rank, program.mode, graph, program.channels, program.state)


def _uses(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def _await_first(graph: fx.Graph) -> None:
    _uses(graph, comm.put)[0].prepend(_uses(graph, comm.get)[0])


def _put_twice(graph: fx.Graph) -> None:
    put = _uses(graph, comm.put)[0]
    with graph.inserting_after(put):
        graph.node_copy(put, lambda node: node)


def _get_twice(graph: fx.Graph) -> None:
    got = _uses(graph, comm.get)[0]
    with graph.inserting_after(got):
        graph.node_copy(got, lambda node: node)


def _get_after_the_put(graph: fx.Graph) -> None:
    got = _uses(graph, comm.get)[0]
    next(put for put in _uses(graph, comm.put) if put.args[1] == got.args[0]).append(got)


@pytest.mark.parametrize(
    ("strategy", "change", "message"),
    [
        ("sync", _await_first, "awaited before it is put"),
        ("sync", _put_twice, "put twice"),
        ("sync", _get_twice, "got twice"),
        ("displaced", _get_after_the_put, "the last message is read after the put"),
    ],
)
def test_the_verifier_refuses_a_broken_step(strategy: str, change: Any, message: str) -> None:
    program = StepPrograms(planned("block", strategy)[2].graph, 0)["steady"]
    verify_step(program)
    with pytest.raises(AssertionError, match=message):
        verify_step(_edited(program, change))


def test_ranks_that_wait_for_each_other_are_an_error() -> None:
    model, given, plan = planned("block", "sync")
    tensors = Call.of(model, (), given).tensors
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    values = dict(zip(plan.program.weights, weights, strict=True)) | plan.program.constants
    values |= dict(zip(plan.program.inputs, tensors, strict=True)) | {"pace": torch.tensor(0.0)}
    programs = [StepPrograms(plan.graph, rank)["exact"] for rank in range(WORLD)]
    programs[0] = _edited(programs[0], lambda graph: graph.erase_node(_uses(graph, comm.put)[0]))
    ends = [RankChannel.of_ranks(spec, range(WORLD), CPU) for spec in programs[0].channels]
    codes = [step_code(program) for program in programs]
    runs = [code.run([values[name] for name in code.placeholders]) for code in codes]
    # the others wait for what rank 0 never puts, and rank 0 for what they put later
    with (
        torch.no_grad(),
        pytest.raises(AssertionError, match=r"every rank waits for another one, at channels \[0, 1\]"),
    ):
        run_in_turns(runs, [[of_ranks[rank] for of_ranks in ends] for rank in range(WORLD)])


def test_a_step_without_state_has_one_input_for_its_pace() -> None:
    _, _, plan = planned("block", "sync")
    placeholders = StepPrograms(plan.graph, 0)["exact"].graph.find_nodes(op="placeholder")
    assert [str(node.target) for node in placeholders].count(PACE) == 1
