"""Simulate all ranks through consecutive steps: each has a host, a stream of kernels, and messages on a link.

The host launches kernels; the stream runs each after the one before and after its launch. A put hands a message to the
link; a get lets the stream wait for it. Messages go in the order of their puts, unless the link lets what a step awaits
overtake messages for the next step. All ranks run the same events in the same order, and a message concerns only the
ranks that take part in it. So the events are simulated in this order, for all ranks at once, without a queue of events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..passes.targets import Link
from .events import Event, Get, Message, Put, Step, Work
from .price import Figures

#: is called with (what, event, begin and end on each rank in seconds)
Record = Callable[[str, Event, Figures, Figures], None]

SETTLING = 50  #: steps until a generation is at its end anyway


@dataclass(frozen=True, eq=False)
class Elapsed:
    """One simulated step, in seconds of each rank."""

    ended: Figures  #: since the first step began
    launching: float  #: the host that launched most kernels did so
    busy: Figures  #: the stream ran kernels
    exposed: Figures  #: the stream waited for messages, or the rank copied them, or the link's threads had the cores


class Simulation:
    """The clocks of all ranks, and the messages on their way, from step to step."""

    def __init__(self, world: int, link: Link, record: Record | None = None) -> None:
        self.world = world
        self.link = link
        self.record = record
        self.host = np.zeros(world)
        self.stream = np.zeros(world)
        self.arrival: dict[str, Figures] = {}  #: of the message that each channel holds
        self.late: set[str] = set()  #: channels whose message may still be on its way
        self.flights: dict[str, tuple[Put, Figures]] = {}  #: of each channel: the put, and when the message set out
        #: when the messages put so far have gone: those that a step awaits where they overtake, and all others
        self.free = {True: np.zeros(world), False: np.zeros(world)}

    def step(self, step: Step) -> Elapsed:
        """Simulate one step."""
        self.launching, self.busy, self.exposed = (np.zeros(self.world) for _ in range(3))
        for event in (step if self.record else step.merged).events:
            if isinstance(event, Work):
                self._work(event)
            elif isinstance(event, Put):
                self._put(event)
            else:
                self._get(event)
        self.host = self.stream = np.maximum(self.host, self.stream)
        return Elapsed(self.stream, float(self.launching.max()), self.busy, self.exposed)

    def settle(self, step: Step) -> None:
        """Simulate steps until each begins as the one before did.

        On a link that is slower than the step, messages for the next step pile up over several steps before one waits.
        """
        lag = self._lag()
        for _ in range(SETTLING):
            before = lag
            began = self.stream.max()
            self.step(step)
            lag = self._lag()
            if before.shape == lag.shape and np.allclose(before, lag, rtol=0, atol=1e-6 * (self.stream.max() - began)):
                return

    def _lag(self) -> np.ndarray:
        """Seconds from now until the ranks are together, the link is free, and each message has arrived."""
        later = [self.stream.max(), *self.free.values(), *self.arrival.values()]
        return np.maximum(np.stack([np.broadcast_to(each, self.world) for each in later]) - self.stream, 0)

    def _work(self, work: Work, event: Event | None = None) -> None:
        began = np.maximum(self.stream, self.host + work.lag - work.seconds)
        self.stream = np.maximum(self.stream + work.seconds, self.host + work.lag)
        self.host = self.host + work.host
        self.launching = self.launching + work.host
        self.busy += work.seconds
        if self.record is not None:
            self.record("work", event or work, began, self.stream)

    def _put(self, put: Put) -> None:
        message = put.message
        self._work(put.writing, put)
        ready = np.maximum(self.stream, self.host)
        if self.link.medium == "memory":
            self.exposed += put.writing.seconds
            sources = np.where(message.bytes.T > 0, ready, -np.inf)  # [destination, source]
            self.arrival[message.spec.name] = np.maximum(sources.max(1), 0) + self.link.latency
            self.flights[message.spec.name] = put, ready
            return
        overtakes = self.link.overtake and not message.late
        ready = np.maximum(ready, self.free[overtakes])
        began = np.where(message.partners, ready, -np.inf).max(1)
        lasts = transfer(message, self.link)
        self.free[overtakes] = self.arrival[message.spec.name] = began + lasts
        if overtakes:
            busy = self._delay(began, lasts)
            longer = max(self.link.busy_latency - self.link.latency, 0.0)
            self.arrival[message.spec.name] = began + lasts + np.where(busy & (lasts > 0), longer, 0.0)
        elif message.late:
            self.late.add(message.spec.name)
        self.flights[message.spec.name] = put, began
        if message.late:
            taken = taken_from_cores(message, self.link)
            self.stream = self.stream + taken
            self.exposed += taken

    def _delay(self, began: Figures, lasts: Figures) -> np.ndarray:
        """Let the messages for the next step wait while one that overtakes them is on its way.

        Returns:
            On which ranks there are such messages.
        """
        busy = np.zeros(self.world, dtype=bool)
        for name in list(self.late):
            arrival = self.arrival[name]
            waits = arrival > began
            if waits.any():
                busy |= waits
                self.arrival[name] = arrival + np.where(waits, lasts, 0)
            else:
                self.late.discard(name)
        self.free[False] = self.free[False] + np.where(self.free[False] > began, lasts, 0)
        return busy

    def _get(self, get: Get) -> None:
        now = np.maximum(self.stream, self.host)
        arrival = self.arrival.get(get.message.spec.name, now)
        waits = np.maximum(arrival - now, 0)
        if self.record is not None:
            self.record("wait", get, now, now + waits)
            if flight := self.flights.pop(get.message.spec.name, None):
                self.record("message", flight[0], flight[1], arrival)
        self.exposed += waits
        self.stream = np.maximum(self.stream, arrival)
        if self.link.medium == "memory":
            self.exposed += get.reading.seconds
        self._work(get.reading, get)


def taken_from_cores(message: Message, link: Link) -> Figures:
    """Seconds that the link's threads take from each rank's computing while the message travels."""
    carried = message.sent + message.received
    seconds = carried / link.core_bandwidth if link.core_bandwidth else np.zeros(len(carried))
    return np.where(carried > 0, link.core_latency + seconds, 0.0)


def transfer(message: Message, link: Link) -> Figures:
    """Seconds of a message for each rank, when it has the link for itself."""
    world = len(message.bytes)
    if link.inside is not None and link.nodes > 1:
        node = np.arange(world) * link.nodes // world
        apart = node[:, None] != node[None, :]
        within = _ports(np.where(apart, 0, message.bytes), link.inside, message.late)
        across = np.where(apart, message.bytes, 0)
        if message.broadcast:  # each part travels once to each other machine
            across = across / np.maximum(1, np.bincount(node)[node])[None, :]
        between = np.array(
            [[across[node == a][:, node == b].sum() for b in range(link.nodes)] for a in range(link.nodes)]
        )
        return np.maximum(within, _ports(between, link, message.late)[node])
    return _ports(message.bytes, link, message.late)


def _ports(amounts: np.ndarray, link: Link, late: bool) -> Figures:
    """Seconds in which each end of a link has sent and received: [source, destination] in bytes."""
    latency, bandwidth = link.latency, link.bandwidth
    if late:
        latency, bandwidth = link.late_latency or latency, link.late_bandwidth or bandwidth
    if link.medium == "bus":
        return np.full(len(amounts), latency + amounts.sum() / bandwidth)
    size = np.maximum(amounts.sum(0), amounts.sum(1))
    return np.where(size > 0, latency + size / bandwidth, 0.0)
