"""Steps of processes that run several ranks in turn, or that are not equally fast, made of the steps of the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..ir.mesh import Placement
from .events import Event, Get, Message, Put, Step, Work, bytes_of


@dataclass(frozen=True, eq=False)
class Bundles(Message):
    """What processes send each other in one channel. What stays in a process is copied, but not sent."""

    placement: Placement

    @cached_property
    def bytes(self) -> np.ndarray:
        """Bytes from each process to each: [source, destination]. What several ranks get alike travels once."""
        return self._between(Message(self.id, self.spec, self.late).bytes)

    def received_of(self, rank: int) -> dict[str, int]:
        """Bytes that a process receives, by exchange."""
        tables = (self._between(bytes_of(each)) for each in self.spec.exchanges)
        return {f"{self.id}.{i}": int(table[:, rank].sum()) for i, table in enumerate(tables)}

    def _between(self, pairs: np.ndarray) -> np.ndarray:
        """Bytes between processes of those between ranks."""
        join = np.max if self.broadcast else np.sum
        columns = np.stack([join(pairs[:, list(ranks)], axis=1) for ranks in self.placement], 1)
        found = np.stack([columns[list(ranks)].sum(0) for ranks in self.placement])
        np.fill_diagonal(found, 0)
        return found

    @cached_property
    def partners(self) -> np.ndarray:
        pairs = Message(self.id, self.spec, self.late).partners
        columns = np.stack([pairs[:, list(ranks)].any(1) for ranks in self.placement], 1)
        found = np.stack([columns[list(ranks)].any(0) for ranks in self.placement])
        return found | np.eye(len(found), dtype=bool)


def on_processes(step: Step, placement: Placement, speeds: tuple[float, ...]) -> Step:
    """The step of each process: its ranks compute one after the other between two exchanges.

    Args:
        speeds: of the processes, relative to the target.
    """
    messages = {
        event.message: Bundles(event.message.id, event.message.spec, event.message.late, placement)
        for event in step.events
        if not isinstance(event, Work)
    }

    def placed(event: Event) -> Event:
        if isinstance(event, Put):
            return Put(messages[event.message], _in_turn(event.writing, placement, speeds))
        if isinstance(event, Get):
            return Get(messages[event.message], _in_turn(event.reading, placement, speeds))
        return _in_turn(event, placement, speeds)

    return Step(tuple(map(placed, step.events)))


def _in_turn(work: Work, placement: Placement, speeds: tuple[float, ...]) -> Work:
    """The work of the ranks of each process, one after the other."""
    host, seconds, lag = (np.broadcast_to(each, placement.world) for each in (work.host, work.seconds, work.lag))
    each_process: list[Work] = []
    for ranks, speed in zip(placement, speeds, strict=True):
        own = Work(work.name, work.path, np.zeros(()), np.zeros(()), np.zeros(()))
        for rank in ranks:
            took = seconds[rank] / speed
            own = own.then(Work(work.name, work.path, host[rank], took, lag[rank] - seconds[rank] + took))
        each_process.append(own)
    figures = (
        np.array([getattr(own, name) for own in each_process], dtype=float) for name in ("host", "seconds", "lag")
    )
    return Work(work.name, work.path, *figures)
