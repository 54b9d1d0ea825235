"""Trace two consecutive displaced steps, message by message: launched in one step, awaited in the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import DISPLACED, Stepper
from fxpass.ir.step import EXACT, Step
from fxpass.predict.recorded import Log, Span, complete, now, recorded, timeline

CONTEXT = 2  #: the context whose channels are traced; other steps use others


@dataclass(frozen=True)
class Trace:
    """The records of all ranks."""

    logs: list[Log]

    def __post_init__(self) -> None:
        complete(self.logs)

    def written(self, file: Path, what: str) -> str:
        """Write `chrome()` next to `file`, with `what` added to its name; returns `table()`."""
        place = file.with_stem(f"{file.stem}-{what}")
        place.write_text(self.chrome())
        return f"{place}\n{self.table()}"

    def table(self) -> str:
        """Rank 0's messages of the first step, in ms since its start."""
        log = self.logs[0]
        first, second = log.steps

        def ms(moment: float | None) -> str:
            return f"{'':>10}" if moment is None else f"{1e3 * (moment - first.began):10.1f}"

        flights = [flight for flight in log.flights if flight.began < first.ended]
        names = f"{'launched':>10} {'arrived':>10} {'awaited':>10} {'blocked':>9}"
        lines = [f"  {'message':<16} {'role':<12} {'KB':>8} {names}   (ms)"]
        lines += [
            f"  {f.node:<16} {f.role:<12} {f.bytes / 1e3:8.1f} {ms(f.launched)} {ms(f.arrived)} {ms(f.awaited)}"
            f" {1e3 * f.blocked:9.2f}"
            for f in flights
        ]
        stale = [f for f in flights if f.awaited is not None and f.awaited > first.ended]
        early = sum(f.arrived is not None and f.awaited is not None and f.arrived <= f.awaited for f in stale)
        lines += [
            f"  steps of {1e3 * first.seconds:.0f} and {1e3 * second.seconds:.0f} ms;"
            f" {len(stale)} messages are awaited a step later, {early} of them had arrived by then",
            f"  {'in the second step, ms':<29} {'blocked':>10} {'launches':>10} {'all':>10}   (of its exchanges)",
        ]
        spans = [span for span in log.spans if span.role and span.began >= second.began]
        for role in dict.fromkeys(span.role for span in spans):
            used = [f for f in log.flights if f.role == role]
            blocked = sum(f.blocked for f in used if f.awaited is not None and f.awaited >= second.began)
            launches = sum(f.launched - f.began for f in used if f.began >= second.began)
            whole = sum(span.seconds for span in spans if span.role == role)
            lines.append(f"    {role:<27} {1e3 * blocked:10.1f} {1e3 * launches:10.1f} {1e3 * whole:10.1f}")
        return "\n".join(lines)

    def chrome(self) -> str:
        """JSON in Chrome's trace format, for https://ui.perfetto.dev."""
        return timeline(self.logs)


@torch.no_grad()
def trace(stepper: Stepper) -> Trace | None:
    """Run one exact and three displaced steps, and record the last two. Returns None on ranks other than 0."""
    log, rank = Log(), dist.get_rank()
    runner = recorded(stepper.plan, stepper.loaded.steps.runners[0].channels(CONTEXT), rank, log)

    def run(step: Step) -> None:
        runner.run(stepper.weights, stepper.tensors(), 0, runner.mode(step), step.pace)

    run(EXACT)
    run(DISPLACED)
    log.clear()
    for name in ("displaced step", "displaced step, the next"):
        began = now()
        run(DISPLACED)
        log.steps.append(Span(name, "step", began, now()))
    written = Log(log.steps, list(log.spans), list(log.flights))
    run(EXACT)  # receive messages in flight
    for flight in written.flights:
        if flight.awaited is not None and flight.awaited > log.steps[-1].ended:
            flight.awaited = flight.taken = None
    logs: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(written, logs)
    return Trace(logs) if logs else None
