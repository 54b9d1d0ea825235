"""Simulated steps of a few events, whose times can be worked out by hand, and of random ones."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fxpass.ir.exchange import Exchange
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Rows, even, full
from fxpass.ir.step import ChannelSpec
from fxpass.passes.targets import Link, Medium
from fxpass.predict.events import Event, Get, Message, Put, Step, Work
from fxpass.predict.simulate import Simulation, transfer
from tests.properties import given

ROWS = 8  #: of each rank


def link(medium: Medium = "ports", latency: float = 0.0, bandwidth: float = 1.0, **more: Any) -> Link:
    return Link("test", "", medium, latency, bandwidth, **more)


def work(*seconds: float, host: float = 0.0) -> Work:
    """Kernels of so many seconds on each rank, or on all."""
    return Work("work", "", np.array([host]), np.array(seconds), np.array(seconds) + host)


def gather(world: int, size: int) -> Exchange:
    """Every rank sends `size` bytes to all others."""
    rows = world * ROWS
    shape = (1, rows, size // (ROWS * 4))
    return Fetch("keys_values", shape, torch.float32, world, dim=1, have=even(rows, world), want=full(rows, world))


def halo(world: int, size: int) -> Exchange:
    """Every rank sends `size` bytes to each neighbour."""
    rows = world * ROWS
    have = even(rows, world)
    want = tuple(Rows.interval(max(0, r.start - 1), min(rows, r.stop + 1)) for r in have)
    return Fetch("halo", (1, rows, size // 4), torch.float32, world, dim=1, have=have, want=want)


def message(exchange: Exchange, late: bool = False, number: int = 0) -> Message:
    return Message(f"x{number}", ChannelSpec(f"exchange_{number}", "", (exchange,), late), late)


def put(m: Message) -> Put:
    return Put(m, work(0.0))


def get(m: Message) -> Get:
    return Get(m, work(0.0))


def ends(world: int, over: Link, *steps: tuple[Event, ...]) -> list[list[float]]:
    """When each rank ends each step."""
    simulation = Simulation(world, over)
    return [simulation.step(Step(events)).ended.tolist() for events in steps]


def test_kernels_run_one_after_the_other() -> None:
    assert ends(2, link(), (work(1.0, 2.0), work(3.0))) == [[4.0, 5.0]]


def test_short_kernels_wait_for_the_host_that_launches_them() -> None:
    short = [work(0.1, host=1.0)] * 3
    assert Simulation(1, link()).step(Step((*short,))).launching == 3
    assert ends(1, link(), (*short,)) == [[pytest.approx(3.1)]]
    assert ends(1, link(), (work(10.0, host=1.0), *short)) == [[pytest.approx(11.3)]]  # launched meanwhile


def test_an_exact_step_waits_for_latency_and_bytes() -> None:
    m = message(gather(2, 64))
    (exact,) = ends(2, link(latency=5.0), (work(1.0), put(m), get(m), work(2.0)))
    assert exact == [1 + 5 + 64 + 2] * 2


def test_a_message_for_the_next_step_costs_nothing_while_the_step_takes_longer() -> None:
    m = message(gather(2, 64), late=True)
    steady = (work(10.0), get(m), put(m), work(90.0))
    assert np.diff(ends(2, link(), *[steady] * 4), axis=0)[-1].tolist() == [100.0, 100.0]
    assert np.diff(ends(2, link(bandwidth=0.5), *[steady] * 4), axis=0)[-1].tolist() == [128.0, 128.0]


def test_messages_that_pile_up_over_many_steps_are_waited_for_once_it_has_settled() -> None:
    several = [message(gather(2, 672), late=True, number=i) for i in range(5)]
    events = [event for m in several for event in (get(m), put(m), work(640.0))]
    simulation = Simulation(2, link())
    first = [simulation.step(Step((*events,))).ended[0] for _ in range(6)]
    assert np.diff(first).tolist()[:3] == [5 * 640] * 3
    simulation.settle(Step((*events,)))
    began = simulation.stream[0]
    assert simulation.step(Step((*events,))).ended[0] - began == pytest.approx(5 * 672)


def test_exposed_seconds_are_those_that_ranks_wait() -> None:
    m = message(gather(2, 64))
    elapsed = Simulation(2, link()).step(Step((work(1.0, 3.0), put(m), work(4.0), get(m))))
    assert elapsed.exposed.tolist() == [3 + 64 - 1 - 4, 64 - 4]
    assert elapsed.busy.tolist() == [5.0, 7.0]


def test_only_neighbours_wait_for_a_slow_rank_in_a_halo_but_all_in_a_gather() -> None:
    slow = work(10.0, 1.0, 1.0, 1.0)
    for exchange, waiting in ((halo(4, 16), [26.0, 42.0, 33.0, 17.0]), (gather(4, 64), [10 + 3 * 64] * 4)):
        m = message(exchange)
        assert ends(4, link(), (slow, put(m), get(m)))[0] == waiting


def test_a_bus_carries_one_message_at_a_time() -> None:
    m = message(gather(4, 64))
    assert transfer(m, link("bus")).tolist() == [4 * 3 * 64] * 4
    assert transfer(m, link("ports")).tolist() == [3 * 64] * 4


def test_what_a_step_awaits_overtakes_messages_for_the_next_where_the_link_allows_it() -> None:
    late, now = message(gather(2, 640), late=True), message(gather(2, 64), number=1)
    steps = ((put(late), put(now), get(now)), (get(late),))
    assert ends(2, link(overtake=True), *steps) == [[64.0, 64.0], [704.0, 704.0]]
    assert ends(2, link(), *steps) == [[704.0, 704.0], [704.0, 704.0]]


def test_what_overtakes_messages_for_the_next_step_takes_longer_while_they_are_on_their_way() -> None:
    late, now = message(gather(2, 640), late=True), message(gather(2, 64), number=1)
    over = link(latency=8.0, busy_latency=30.0, overtake=True)
    steps = ((put(late), put(now), get(now)), (get(late),), (put(now), get(now)))
    first = 30.0 + 64
    last = 8 + 640 + 8 + 64.0  # the link is idle again after the messages of both
    assert ends(2, over, *steps) == [[first] * 2, [last] * 2, [last + 8 + 64] * 2]


@pytest.mark.parametrize("medium", ["ports", "bus"])
def test_messages_for_the_next_step_have_figures_of_their_own(medium: Medium) -> None:
    over = link(medium, latency=8.0, late_latency=1.0, late_bandwidth=4.0)
    carried = 64 if medium == "ports" else 2 * 64
    assert transfer(message(gather(2, 64)), over).tolist() == [8.0 + carried] * 2
    assert transfer(message(gather(2, 64), late=True), over).tolist() == [1.0 + carried / 4] * 2
    plain = link(medium, latency=8.0)
    assert transfer(message(gather(2, 64), late=True), plain).tolist() == [8.0 + carried] * 2


def test_threads_of_the_link_take_time_from_computing_while_a_message_travels() -> None:
    over = link(core_latency=3.0, core_bandwidth=16.0)
    late, awaited = message(gather(2, 64), late=True), message(gather(2, 64))
    simulation = Simulation(2, over)
    assert simulation.step(Step((work(1.0), put(late), work(90.0)))).ended.tolist() == [1 + 3 + 2 * 64 / 16 + 90] * 2
    assert ends(2, over, (put(awaited), get(awaited))) == [[64.0, 64.0]]  # the cores would be idle


def test_ranks_that_share_a_memory_copy_by_themselves() -> None:
    m = message(gather(3, 64))
    simulation = Simulation(3, link("memory", latency=1.0))
    written = Put(m, work(*[64.0] * 3))
    read = Get(m, work(*[128.0] * 3))
    elapsed = simulation.step(Step((work(2.0), written, read)))
    assert elapsed.ended.tolist() == [2 + 64 + 1 + 128] * 3
    assert elapsed.exposed.tolist() == [64 + 1 + 128] * 3


def test_between_machines_a_gathered_part_travels_once() -> None:
    over = link(bandwidth=1.0, nodes=2, inside=link(bandwidth=1000.0))
    assert transfer(message(gather(8, 64)), over).tolist() == [4 * 64] * 8
    assert transfer(message(halo(4, 16)), over).tolist() == [16.0] * 4
    assert transfer(message(gather(2, 64)), link(nodes=2, inside=link())).tolist() == [64.0] * 2


def test_merged_events_take_as_long_as_single_ones() -> None:
    m = message(gather(2, 64))
    events = (work(1.0, host=2.0), work(5.0, 0.1, host=1.0), put(m), work(0.2, host=3.0), work(2.0), get(m))
    single = Simulation(2, link(), record=lambda *_: None).step(Step(events))
    merged = Simulation(2, link()).step(Step(events))
    assert len(Step(events).merged.events) == 4
    assert merged.ended.tolist() == single.ended.tolist() != [0, 0]


# -- against a queue of events ---------------------------------------------------------------------------------------


def queued(world: int, over: Link, events: list[Event]) -> list[float]:
    """When each rank ends a step, by a queue of events: ranks wait for messages, messages for all who take part."""
    queue: list[tuple[float, int, int]] = [(0.0, rank, 0) for rank in range(world)]
    heapq.heapify(queue)
    ready: dict[str, dict[int, float]] = {}  #: of each message: when each rank has put it
    there: dict[tuple[str, int], float] = {}  #: when a rank has a message
    asleep: dict[tuple[str, int], tuple[float, int]] = {}  #: ranks that wait for one
    ended = [0.0] * world
    while queue:
        now, rank, place = heapq.heappop(queue)
        if place == len(events):
            ended[rank] = now
            continue
        event = events[place]
        if isinstance(event, Work):
            heapq.heappush(queue, (now + float(np.broadcast_to(event.seconds, world)[rank]), rank, place + 1))
        elif isinstance(event, Put):
            name = event.message.id
            ready.setdefault(name, {})[rank] = now
            heapq.heappush(queue, (now, rank, place + 1))
            _send(event.message, over, ready[name], there)
            for key in [key for key in asleep if key in there]:
                since, where = asleep.pop(key)
                heapq.heappush(queue, (max(since, there[key]), key[1], where))
        elif (event.message.id, rank) in there:
            heapq.heappush(queue, (max(now, there[event.message.id, rank]), rank, place + 1))
        else:
            asleep[event.message.id, rank] = now, place + 1
    return ended


def _send(m: Message, over: Link, ready: dict[int, float], there: dict[tuple[str, int], float]) -> None:
    """Let the message go on each rank whose partners have all put it."""
    for rank, lasts in enumerate(transfer(m, over).tolist()):
        partners = np.flatnonzero(m.partners[rank]).tolist()
        if (m.id, rank) not in there and all(each in ready for each in partners):
            there[m.id, rank] = max(ready[each] for each in partners) + lasts


@given(st.data(), st.integers(2, 4))
def test_random_exact_steps_take_as_long_as_with_a_queue_of_events(data: st.DataObject, world: int) -> None:
    over = link(latency=data.draw(st.integers(0, 9)))
    events: list[Event] = []
    for number in range(data.draw(st.integers(1, 4))):
        seconds = data.draw(st.lists(st.integers(0, 200), min_size=world, max_size=world))
        m = message(data.draw(st.sampled_from([gather, halo]))(world, 32 * data.draw(st.integers(1, 4))), number=number)
        events += [work(*map(float, seconds)), put(m), work(float(data.draw(st.integers(0, 99)))), get(m)]
    assert ends(world, over, tuple(events))[0] == pytest.approx(queued(world, over, events))
