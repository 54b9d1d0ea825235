"""Predictions of plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fxpass.capture import capture
from fxpass.inspect.words import seconds_text
from fxpass.ir.step import Mode
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import plan
from fxpass.passes.lower_comm import StepPrograms
from fxpass.passes.targets import Target, find
from fxpass.predict.choose import choose, choose_strategy
from fxpass.predict.compare import Impossible, advice, compared, slower_than_fewer
from fxpass.predict.events import step_of
from fxpass.predict.prediction import Prediction, predict
from fxpass.predict.price import Prices
from tests.inspect.plans import planned, small
from tests.runtime.plans import block, inputs

#: computing takes long, so that a split is worth it
SLOW = Target(replace(find("cpu").device, matrix={"float32": 1e6}), find("cpu").link)


def over(**changes: Any) -> Target:
    return replace(SLOW, link=replace(SLOW.link, **{"medium": "ports", **changes}))


def test_more_ranks_are_faster_where_messages_cost_nothing_and_slower_where_they_cost_much() -> None:
    free, dear = over(latency=0.0, bandwidth=1e15), over(latency=1.0)
    one, two = (planned(world=world).predict(free).exact.seconds for world in (1, 2))
    assert one / two == pytest.approx(planned(world=2).bound, rel=0.1)
    assert planned(world=2).predict(dear).exact.seconds > one


def test_displaced_steps_hide_messages_that_exact_steps_wait_for() -> None:
    target = over(latency=1e-3)
    made = planned("displaced", 2).predict(target)
    assert made.steady is not None
    assert made.exact.exposed > 3e-3
    assert made.steady.exposed < made.exact.exposed / 3
    assert made.steady.seconds < made.exact.seconds
    assert planned("sync", 2).predict(target).steady is None


def test_figures_of_messages_for_the_next_step_leave_exact_steps_alone() -> None:
    plain, slow = (planned("displaced", 2).predict(over(latency=1e-3, late_latency=late)) for late in (0.0, 1.0))
    assert plain.steady is not None
    assert slow.steady is not None
    assert slow.exact == plain.exact
    assert slow.steady.seconds > 1 > plain.steady.seconds


def test_a_plan_can_be_predicted_on_other_targets_and_over_other_links() -> None:
    made = planned("displaced")
    assert made.predict().target == made.target == find("cpu")
    assert made.predict(link="pcie4").target == Target(find("cpu").device, find("H100", "pcie4").link)
    assert made.predict("H100", "pcie4").target.name == "H100 over pcie4"


def test_a_generation_has_exact_steps_at_its_ends() -> None:
    made = planned("displaced", 2).predict(over(latency=1e-3))
    assert made.steady is not None
    assert made.generation(50) == pytest.approx(5 * made.exact.seconds + 45 * made.steady.seconds)
    assert made.generation(3) == pytest.approx(3 * made.exact.seconds)


def test_a_step_receives_in_the_simulation_what_the_plan_says() -> None:
    made = planned("compressed", 3)
    modes: tuple[tuple[Mode, bool], ...] = (("exact", True), ("steady", False))
    for mode, exact in modes:
        target = find("cpu")
        program = StepPrograms(made.graph, 0)[mode]
        step = step_of(program, made.graph, Prices(target.device, 3), target.link, 0.0)
        for rank in range(3):
            received = {name: size for m in step.messages for name, size in m.received_of(rank).items()}
            assert received == {e.id: e.received(rank, exact=exact) for e in made.exchanges if e.id in received}
            assert sum(received.values()) == sum(made.bytes_received(rank, exact=exact).values())


def test_the_programs_of_all_ranks_have_the_same_operators_so_that_one_serves_for_all() -> None:
    for made in (planned("displaced", 3), small("flux", 3, "compressed")):
        for mode in ("exact", "steady"):
            graphs = [StepPrograms(made.graph, rank)[mode].graph for rank in range(3)]
            assert len({tuple((n.op, str(n.target)) for n in graph.nodes) for graph in graphs}) == 1


def test_a_device_that_is_too_small_is_noticed() -> None:
    made = planned().predict(SLOW)
    assert made.fits is None
    assert replace(made, target=Target(replace(SLOW.device, memory=made.memory.total), SLOW.link)).fits is True
    assert replace(made, target=Target(replace(SLOW.device, memory=made.memory.total - 1), SLOW.link)).fits is False


def predicted(worlds: tuple[int, ...], target: Target, *strategies: str) -> list[Prediction | Impossible]:
    return list(compared(planned().program, worlds, list(map(Strategy.of, strategies)), target))


def test_a_comparison_has_every_number_of_ranks_and_strategy_and_says_what_is_impossible() -> None:
    rows = predicted((1, 2, 8, 100), over(latency=0.0), "sync", "displaced", "sync")
    assert [(row.world, getattr(row, "strategy", None) and row.strategy.name) for row in rows[:3]] == [
        (1, "sync"), (2, "sync"), (2, "displaced")
    ]  # fmt: skip
    impossible = [row for row in rows if isinstance(row, Impossible)]
    assert impossible[-1].world == 100
    assert "100 ranks" in impossible[-1].reason


def test_a_comparison_predicts_what_a_plan_does() -> None:
    (row,) = predicted((2,), SLOW, "displaced")
    made = planned("displaced")
    assert row == predict(made.program, made.graph, 2, made.strategy, SLOW)


def test_advice_says_plainly_what_would_be_faster() -> None:
    slow = [row for row in predicted((1, 2), over(latency=1.0), "sync", "displaced") if isinstance(row, Prediction)]
    one, two, stale = slow
    times = f"{seconds_text(two.generation(50))} instead of {seconds_text(one.generation(50))} for 50 steps"
    assert f"2 ranks over cpu would be slower than 1, {times}" in str(advice(two, slow, 50))
    assert advice(one, slow, 50) is None
    assert "strategy 'displaced' would be faster" in str(advice(two, [stale], 50))
    fast = [row for row in predicted((1, 2), over(latency=0.0), "sync") if isinstance(row, Prediction)]
    assert "2 ranks would be faster" in str(advice(fast[0], fast, 50))


def test_advice_does_not_name_what_does_not_fit() -> None:
    one, two = predicted((1, 2), over(latency=1.0), "sync")
    assert isinstance(one, Prediction)
    assert isinstance(two, Prediction)
    room = Target(replace(SLOW.device, memory=two.memory.total), two.target.link)
    assert one.memory.total > two.memory.total
    assert advice(replace(two, target=room), [replace(one, target=room)], 50) is None


def test_the_strategy_auto_is_displaced_where_messages_take_long_and_else_exact() -> None:
    program = planned().program
    assert choose_strategy(program, 2, over(latency=1e-2)).name == "displaced"
    assert choose_strategy(program, 2, over(latency=0.0, bandwidth=1e15)).name == "sync"
    assert choose_strategy(program, 1, over(latency=1e-2)).name == "sync"
    assert choose_strategy(program, 100, SLOW).name == "sync"  # so many ranks are refused when they are planned


def test_auto_divides_the_guidance_branches_of_a_batch_where_messages_take_long() -> None:
    choice = choose(planned().program, 2, over(latency=1e-3))
    assert (choice.groups, choice.copies, choice.strategy.name) == (2, 1, "sync")


def test_auto_leaves_ranks_over_where_fewer_are_faster() -> None:
    sample, timestep = inputs()
    one = capture(block(), sample[:1], timestep)
    choice = choose(one, 4, over(latency=1.0))
    assert (choice.groups, choice.copies, choice.strategy.name) == (1, 4, "sync")
    fast = over(latency=0.0, bandwidth=1e15)
    assert choose(one, 4, fast).copies == choose(one, 1, fast).copies == 1
    assert choose(one, 100, fast).copies > 1  # 100 ranks cannot share 16 rows


def test_a_plan_for_auto_has_the_mesh_that_is_predicted_to_be_fastest() -> None:
    target = over(latency=1e-3)
    made = plan(block(), *inputs(), world_size=4, strategy="auto", target=target)
    choice = choose(made.program, 4, target)
    groups = choice.groups * choice.copies
    assert (made.mesh.groups, made.copies, made.strategy) == (groups, choice.copies, choice.strategy)
    assert made.predict() == choice.prediction
    divided = plan(block(), *inputs(), world_size=4, strategy="auto", cfg=2, target=over(latency=10.0))
    assert (divided.mesh.groups, divided.copies) == (2, 1)  # as it was asked for


def test_a_split_that_is_slower_than_fewer_ranks_is_noticed() -> None:
    made = planned()
    assert "slower than 1" in str(slower_than_fewer(made.program, made.predict(over(latency=1.0))))
    assert slower_than_fewer(made.program, made.predict(over(latency=0.0))) is None
    one = planned(world=1)
    assert slower_than_fewer(one.program, one.predict(SLOW)) is None


@pytest.mark.parametrize("world", [4, 8])
def test_the_best_of_fewer_ranks_is_named_where_one_is_slower_too(world: int) -> None:
    target, made = over(latency=0.0, bandwidth=1e5, medium="bus"), planned(world=world)
    one, two, four = (planned(world=ranks).predict(target).generation(50) for ranks in (1, 2, 4))
    assert two < four < one
    assert str(slower_than_fewer(made.program, made.predict(target))).startswith("2 ranks would be faster")
