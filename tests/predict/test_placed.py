"""Predicted steps of processes that run several ranks in turn, or are not equally fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fxpass
from fxpass.ir.mesh import Placement
from fxpass.passes.lower_comm import StepPrograms
from fxpass.predict.events import Work
from fxpass.predict.placed import on_processes
from fxpass.predict.prediction import Steps, predict
from tests.runtime.plans import block, inputs


def planned(**options: Any) -> fxpass.Plan:
    return fxpass.plan(block(), *inputs(64), strategy="displaced", **options)


def test_processes_of_one_rank_take_what_ranks_take() -> None:
    plan = planned(world_size=4)
    given = plan.program, plan.graph, 4, plan.strategy, plan.target
    each = predict(*given, placement=Placement.one_each(4), speeds=(1.0,) * 4)
    assert each == predict(*given) == plan.predict()


@pytest.mark.parametrize("options", [{"world_size": 2, "patches": 6}, {"world_size": 4, "cfg": 2, "patches": 4}])
def test_only_what_other_processes_send_travels(options: dict[str, Any]) -> None:
    plan = planned(**options)
    placement = plan.placement
    steps = Steps.of(plan.program, plan.graph, plan.world_size, plan.target).modes
    for mode, step in steps.items():
        messages = on_processes(step, placement, (1.0,) * placement.processes).messages
        received = np.sum([message.received for message in messages], axis=0)
        for process, ranks in enumerate(placement):
            programs = [StepPrograms(plan.graph, rank)[mode] for rank in ranks]
            assert sum(sum(each.received(ranks).values()) for each in programs) == received[process]


def test_a_process_keeps_the_state_of_its_ranks_and_one_copy_of_the_weights() -> None:
    few, many = planned(world_size=2, patches=8).predict(), planned(world_size=8).predict()
    kept = planned(world_size=8).state_bytes_per_rank
    assert few.memory.weights == many.memory.weights
    assert few.memory.state in (sum(kept[:4]), sum(kept[4:]))
    assert few.memory.activations > many.memory.activations


def test_ranks_of_a_process_compute_one_after_the_other_and_a_slow_process_takes_longer() -> None:
    plan, alike = planned(world_size=2, patches=4), planned(world_size=4)
    step = Steps.of(plan.program, plan.graph, 4, plan.target).modes["exact"].merged
    for speeds in ((1.0, 1.0), (1.0, 0.5)):
        placed = on_processes(step, plan.placement, speeds)
        for event, whole in zip(placed.events, step.events, strict=True):
            if isinstance(whole, Work):
                assert isinstance(event, Work)
                pairs = np.broadcast_to(whole.seconds, 4).reshape(2, 2).sum(1)
                np.testing.assert_allclose(event.seconds, pairs / np.array(speeds))
    assert plan.predict().exact.compute > alike.predict().exact.compute


def test_a_plan_in_proportion_to_speeds_is_faster_than_an_even_one_on_unequal_devices() -> None:
    speeds = (1.0, 0.25)
    even, fitting = planned(world_size=2), planned(world_size=2, speeds=speeds)
    slow = predict(even.program, even.graph, 2, even.strategy, even.target, speeds=speeds)
    assert fitting.predict().exact.compute < slow.exact.compute
    assert fitting.bound < even.bound == 2
    described = fitting.describe()
    assert (described["processes"], described["ranks_per_process"], described["speeds"]) == (2, [1, 1], [1.0, 0.25])
