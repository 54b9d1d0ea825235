"""What a plan says that a rank keeps from one step to the next, against what is kept."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fxpass
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.mesh import Placement
from fxpass.ir.program import Program
from fxpass.ir.step import EXACT, Step
from fxpass.models.small import case
from fxpass.passes.lower_comm import StepPrograms
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.process_group import GroupChannel, held_bytes
from fxpass.runtime.shared_memory import file_layout
from fxpass.runtime.symmetric_memory import buffer_places
from tests.inspect.test_mesh import one_group
from tests.inspect.test_mesh import planned as two_groups
from tests.runtime.plans import block, inputs

WORLD = 3
EACH = Placement.one_each(WORLD)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("no_sync", "corrected_async_gn")]
STRATEGIES = ["sync", "displaced", "compressed", "pcpp", *SLOW]


@cache
def captured(name: str) -> tuple[Any, dict[str, Any], Program]:
    model = case(name).build()
    given = case(name).inputs(rows=32, seed=3, module=model)
    return model, given, fxpass.capture(model, **given)


def planned(name: str, strategy: str) -> tuple[Any, dict[str, Any], fxpass.Plan]:
    model, given, program = captured(name)
    return model, given, fxpass.plan(program, world_size=WORLD, strategy=strategy)


def storages(tensors: Any) -> int:
    found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(found.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_in_one_process_keep_what_the_plan_says(strategy: str) -> None:
    model, given, plan = planned("unet_sdxl", strategy)
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    tensors = Call.of(model, (), given).tensors
    loaded = LockstepExecutor(WORLD).load(plan, weights, tensors)
    steps = [EXACT] * 2 + ([Step(0, False, 1.0)] * 3 if plan.exact_steps else [])
    with torch.no_grad():
        for step in steps:
            loaded.run_all(weights, tensors, step)
    for rank, runner in enumerate(loaded.ranks):
        here = runner._contexts[0]
        late = [end for end, spec in zip(here.channels or (), runner.specs, strict=True) if spec.late]
        arrived = [x for end in late for parts in end.inbox.values() for x in parts if x is not None]
        kept = sum(each.nbytes for each in (*here.state, *arrived))
        said = plan.state_bytes_by_channel["in one process"][rank]
        assert kept == said == plan.state_bytes_per_rank[rank]
        assert storages(here.state) + storages(arrived) <= said  # nothing is a view of something larger
        assert bool(kept) == (strategy != "sync")


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("strategy", ["displaced", "pcpp"])
def test_process_groups_keep_the_messages_for_the_next_step(strategy: str, blocking: bool) -> None:
    _, _, plan = planned("unet_sdxl", strategy)
    specs = StepPrograms(plan.graph, 0).channels
    for rank in range(WORLD):
        board: Any = SimpleNamespace(rank=rank, timeout=1.0)
        ends = [GroupChannel(each, None, range(WORLD), torch.device("cpu"), blocking, board, EACH) for each in specs]
        held = 0
        for end in ends:
            if end.spec.late:
                held += end.blob * WORLD if end.gather else sum(end.sends) + sum(end.receives)
        assert held_bytes(specs, EACH, rank, blocking=blocking) == held > 0


def test_shared_and_symmetric_memory_keep_the_buffers_of_all_messages() -> None:
    _, _, plan = planned("unet_sdxl", "displaced")
    specs, said = StepPrograms(plan.graph, 0).channels, plan.state_bytes_by_channel
    state = said["shared memory"][0] - file_layout(specs, EACH, 0)[0]
    assert state == said["symmetric memory"][0] - buffer_places(specs, WORLD)[0] > 0
    assert said["gloo"][0] == state + held_bytes(specs, EACH, 0, blocking=True)


def test_a_group_of_a_mesh_keeps_what_it_keeps_alone() -> None:
    mesh = two_groups()
    assert "symmetric memory" not in mesh.state_bytes_by_channel
    for kind in ("in one process", "gloo"):
        assert mesh.state_bytes_by_channel[kind] == one_group().state_bytes_by_channel[kind] * 2, kind


def test_the_ranks_of_a_line_gather_through_gloo_groups_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpass.runtime.process_group.SMALL", 0)
    plan = fxpass.plan(block(), *inputs(rows=64), world_size=8, cfg=2, strategy="displaced")
    specs, rank = StepPrograms(plan.graph, 0).channels, 5
    board: Any = SimpleNamespace(rank=rank, timeout=1.0)
    late = [each for each in specs if each.late]
    places = Placement.one_each(8)
    ends = [GroupChannel(each, None, each.members(rank), torch.device("cpu"), True, board, places) for each in late]
    held = sum(end.blob * len(end.members) if end.gather else sum(end.sends) + sum(end.receives) for end in ends)
    assert any(end.gather for end in ends)
    assert held_bytes(specs, places, rank, blocking=True) == held
