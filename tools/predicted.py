"""Print what a simulation predicts of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..predict.compare import Impossible
    from ..predict.prediction import Prediction, StepTime


def show(out: Console, chosen: Prediction, others: Sequence[Prediction | Impossible], steps: int) -> None:
    """Print the steps, a generation and the memory of `chosen`, and what would be faster.

    Args:
        others: other numbers of ranks and strategies; the first is one rank.
        steps: of a generation.
    """
    from ..inspect.words import bytes_text, count_text, seconds_text
    from ..predict.compare import advice
    from ..predict.prediction import Prediction
    from .commands.plan import table

    launched = "as CUDA graphs" if chosen.graphs else "one by one"
    device = chosen.target.device
    out.print(f"\npredicted on {chosen.target.name}" + (f", kernels launched {launched}" if device.launch else ""))
    by_host = bool(device.launch) and not chosen.graphs
    columns = ("takes", *(["launching"] if by_host else []), "computing", "waiting for messages")
    times = table("", *columns, right=True)

    def step(name: str, each: StepTime) -> None:
        parts = (each.seconds, *([each.launching] if by_host else []), each.compute, each.exposed)
        times.add_row(name, *map(seconds_text, parts))

    step("an exact step", chosen.exact)
    if chosen.steady is not None:
        step("a displaced step", chosen.steady)
    times.add_row(count_text(steps, "step"), seconds_text(chosen.generation(steps)))
    out.print(times)
    memory = chosen.memory
    needed = ", ".join(f"{name} {bytes_text(size)}" for name, size in memory.items())
    fits = {True: "fits", False: "does not fit", None: "whether it fits is unknown"}[chosen.fits]
    room = f" of {bytes_text(device.memory)}" if device.memory else ""
    out.print(f"memory of a device: {bytes_text(memory.total)}{room}, {fits} ({needed})", soft_wrap=True)
    possible = [each for each in others if isinstance(each, Prediction)]
    if len(others) > 1:
        out.print(_compared([chosen, *others], steps))
    better = advice(chosen, possible, steps)
    alone = next((each for each in possible if each.world == 1), None)
    if better is not None:
        out.print(better, style="bold yellow", soft_wrap=True)
    elif alone is not None and chosen.world > 1:
        out.print(f"{alone.generation(steps) / chosen.generation(steps):.2f} times as fast as 1 rank", style="bold")


def _compared(rows: Sequence[Prediction | Impossible], steps: int) -> RenderableType:
    """A row for each number of ranks and strategy."""
    from ..inspect.words import bytes_text, count_text, seconds_text
    from ..predict.compare import Impossible
    from .commands.plan import table

    alone = next((row.generation(steps) for row in rows if not isinstance(row, Impossible) and row.world == 1), None)
    whole_name = count_text(steps, "step")
    shown = table("ranks", "strategy", "an exact step", "a displaced step", whole_name, "speed", "memory", right=True)
    seen = set()
    for row in sorted(rows, key=lambda each: each.world):
        if isinstance(row, Impossible):
            shown.add_row(str(row.world), row.reason.partition("\n")[0])
        elif (row.world, row.strategy) not in seen:
            seen.add((row.world, row.strategy))
            whole = row.generation(steps)
            shown.add_row(
                str(row.world),
                row.strategy.name if row.world > 1 else "",
                seconds_text(row.exact.seconds),
                seconds_text(row.steady.seconds) if row.steady is not None else "",
                seconds_text(whole),
                f"{alone / whole:.2f}" if alone is not None else "",
                bytes_text(row.memory.total),
            )
    return shown
