"""`make bench-displaced`: compare steady displaced steps with steps that exchange nothing, on two one-thread ranks.

    python -m benchmarks.displaced [--rounds 20] [--models unet mmdit] [--strategy displaced]
    python -m benchmarks.displaced --trace steps.json [--models unet]

Four contenders alternate in every round; each runs one untimed and then one timed step:

    displaced   steady steps of a stale strategy, "displaced" or another: each waits for what was launched a step before
    no_sync     the same for strategy "no_sync", which sends nothing but the output
    sync        exact steps
    ceiling     the displaced program without exchanges: the same operators, on messages kept from an earlier step

The report has medians per step, ratios per round, and bytes received. With `--trace` two consecutive displaced steps
are recorded instead, in steps-unet.json and so on (see `trace.py`). With `FXPASS_SHM_DISABLE=1` gloo carries messages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness import (
    DISPLACED,
    Contender,
    contenders,
    heading,
    in_rounds,
    on_two_processes,
    ratio,
    spread,
    steppers,
)
from benchmarks.models import MODELS
from benchmarks.trace import trace
from fxpass.ir.strategy import PRESETS

STEPS = 1  #: timed steps per turn, after an untimed one
STALE = [name for name, strategy in PRESETS.items() if name != "no_sync" and not (strategy.exact or strategy.overlaps)]


def main() -> None:
    parser = argparse.ArgumentParser(description="displaced steps against steps that exchange nothing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategy", choices=STALE, default="displaced", help="the displaced one")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of two steps instead")
    options = parser.parse_args()
    if options.trace:
        reports = (traced(name, options.strategy, options.trace) for name in options.models)
    else:
        reports = (measure(name, options.strategy, options.rounds) for name in options.models)
    on_two_processes("benchmarks.displaced", reports)


@torch.no_grad()
def measure(name: str, displaced: str, rounds: int) -> str:
    """Run all four in turns; returns the report."""
    model, ready = steppers(name, (displaced, "no_sync", "sync"))
    running = contenders(ready)
    received = {strategy: ready[strategy].received(each.step) for strategy, each in running.items()}
    running["ceiling"] = Contender(ready[displaced].without_exchanges(DISPLACED))
    seconds = in_rounds(running, rounds, STEPS)
    lines = [heading(name, model, f"{rounds} rounds of {STEPS} steps, medians (min–max) in seconds per step")]
    width = max(map(len, seconds))
    lines += [f"  {key:<{width}} {spread(values)}" for key, values in seconds.items()]
    lines += [
        f"  {displaced} / no_sync   {ratio(seconds[displaced], seconds['no_sync'])}   aim: at most 1.03",
        f"  ceiling / {displaced}   {ratio(seconds['ceiling'], seconds[displaced])}   aim: at least 0.97",
        "  received per rank and step",
    ]
    lines += [f"    {strategy:<{width}} {_bytes(roles)}" for strategy, roles in received.items()]
    return "\n".join(lines)


def _bytes(roles: dict[str, int]) -> str:
    parts = ", ".join(f"{role} {count / 1e6:.3f}" for role, count in roles.items())
    return f"{sum(roles.values()) / 1e6:.2f} MB ({parts})"


@torch.no_grad()
def traced(name: str, displaced: str, file: Path) -> str:
    """Record two displaced steps of `name` next to `file`, with its name added; returns rank 0's table."""
    _, ready = steppers(name, (displaced,))
    seen = trace(ready[displaced])
    return f"{name}: {seen.written(file, name)}" if seen else ""


if __name__ == "__main__":
    main()
