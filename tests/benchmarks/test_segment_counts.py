"""Segments are counted once per form."""

from __future__ import annotations

from benchmarks.segments import count
from fxpass.capture import capture
from fxpass.ir.strategy import Strategy
from fxpass.passes.lower_comm import StepPrograms
from tests.runtime.plans import block, cut_plan, inputs


def test_displaced_steps_have_fewer_segments_for_they_get_and_put_at_one_place() -> None:
    plan = cut_plan(capture(block(), *inputs()), 2, Strategy.of("displaced"))
    programs = StepPrograms(plan.graph, 0)
    exact, steady = count(programs, "exact"), count(programs, "steady")
    assert steady.places < exact.places
    assert 1 < steady.distinct <= steady.places
