"""The predicted timeline of all ranks in Chrome's trace format, for https://ui.perfetto.dev."""

from __future__ import annotations

import numpy as np

from ..ir.mesh import Placement
from ..passes.targets import Link
from .chrome import AWAITED, COMPUTE, LATE, Timeline
from .events import Event, Get, Put, Work
from .prediction import Steps
from .price import Figures
from .simulate import Simulation


def timeline(steps: Steps, placement: Placement, link: Link) -> str:
    """JSON: an exact step and, if there are displaced ones, two of these.

    Each process has three threads. Kernels have the names of the plan's nodes: of several ranks, which run in turn,
    they are one bar. Messages have the identifiers of `fxpass dump` (`x3`), with the bytes that the process receives of
    each exchange (`x3.0`) and from each process.
    """
    recorder = _Recorder(placement)
    simulation = Simulation(placement.processes, link, recorder)
    for mode, step in steps.modes.items():
        for _ in range(1 if mode == "exact" else 2):
            began = simulation.stream
            simulation.step(step)
            recorder.bars(
                "exact step" if mode == "exact" else "displaced step", "step", COMPUTE, began, simulation.stream
            )
    return recorder.timeline.text()


class _Recorder:
    """Turns what a simulation reports into events of the trace."""

    def __init__(self, placement: Placement) -> None:
        self.world = world = placement.processes
        self.timeline = Timeline(placement.names)
        self.carried = {thread: np.zeros(world) for thread in (AWAITED, LATE)}  #: the end of the thread's last message

    def __call__(self, what: str, event: Event, began: Figures, ended: Figures) -> None:
        if what == "message" and isinstance(event, Put):
            message = event.message
            thread = LATE if message.late else AWAITED
            receives = message.received > 0  # who receives nothing has no bar
            began = np.maximum(began, self.carried[thread])  # bars of a thread do not overlap
            ended = np.where(receives, np.maximum(began, ended), began)
            self.carried[thread] = np.where(receives, ended, self.carried[thread])
            args = [
                message.received_of(rank)
                | {f"{src} > {rank}": int(size) for src, size in enumerate(message.bytes[:, rank]) if size}
                for rank in range(self.world)
            ]
            role = message.spec.exchanges[0].role
            self.bars(f"{message.id} {role}", "message", thread, began, ended, message.spec.path, args)
        elif what == "wait" and isinstance(event, Get):
            self.bars(f"wait {event.message.id}", "wait", COMPUTE, began, ended, event.message.spec.path)
        elif isinstance(event, Work):
            self.bars(event.name, "kernel", COMPUTE, began, ended, event.path)
        else:
            work = event.writing if isinstance(event, Put) else event.reading
            self.bars(work.name, "exchange", COMPUTE, began, ended, work.path)

    def bars(
        self,
        name: str,
        category: str,
        thread: int,
        began: Figures,
        ended: Figures,
        path: str = "",
        args: list[dict[str, int]] | None = None,
    ) -> None:
        """Add a bar to a thread of each rank, unless it has no length."""
        for rank, times in enumerate(zip(began.tolist(), ended.tolist(), strict=True)):
            self.timeline.bar(rank, thread, name, category, *times, path, args[rank] if args else None)
