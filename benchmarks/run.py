"""`make bench`: compare two single-threaded processes with one, on this machine.

    python -m benchmarks.run [--rounds 7] [--models unet mmdit]

Four contenders alternate in every round, so that other load on the machine affects all of them. Reports medians:

    plain      the unsplit model, rank 0 alone
    captured   the same through capture and lowering with world_size=1, rank 0 alone
    split      both ranks, exact mode
    ceiling    both ranks' programs at once without exchanges (the same operators, on messages kept from an earlier
               call), until both are done: two busy cores slow each other, so 2.0 is not the ceiling of two processes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fxpass
from benchmarks.harness import Stepper, heading, on_two_processes, spread
from benchmarks.models import MODELS
from fxpass.ir.step import EXACT
from fxpass.runtime.distributed import DistributedExecutor

NAMES = ("plain", "captured", "split", "ceiling")


def main() -> None:
    parser = argparse.ArgumentParser(description="fxpass on two processes against one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    on_two_processes("benchmarks.run", (measure(name, options.rounds) for name in options.models))


@torch.no_grad()
def measure(name: str, rounds: int) -> str:
    """Run all four in turns; returns the text of rank 0's report."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    parallel: Any = fxpass.parallelize(model, 2, executor="distributed")
    alone = fxpass.parallelize(model, 1, executor="lockstep")
    rank = dist.get_rank()
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: model(**inputs),
        "captured": lambda: alone(**inputs),
        "split": lambda: parallel(**inputs),
    }
    first = runs["split"]()[0]
    runs["ceiling"] = Stepper(DistributedExecutor(2), parallel.plan, model, inputs).without_exchanges(EXACT)
    difference = ((first - runs["plain"]()[0]).abs().max() / first.abs().max()).item()
    seconds: dict[str, list[float]] = {key: [] for key in NAMES}
    for turn in range(rounds + 1):
        for key in NAMES:
            dist.barrier()
            if rank and key in ("plain", "captured"):
                continue
            started = time.perf_counter()
            runs[key]()
            if key in ("split", "ceiling"):
                dist.barrier()
            if turn:  # the first turn warms up
                seconds[key].append(time.perf_counter() - started)
    return _report(name, model, parallel.plan, difference, seconds) if rank == 0 else ""


def _report(name: str, model: nn.Module, plan: Any, difference: float, seconds: dict[str, list[float]]) -> str:
    median = {key: statistics.median(values) for key, values in seconds.items()}
    lines = [heading(name, model, f"{len(seconds['plain'])} rounds, medians (min–max) in seconds")]
    shares = [ceiling / split for ceiling, split in zip(seconds["ceiling"], seconds["split"], strict=True)]
    lines += [f"  {key:<9} {spread(values)}" for key, values in seconds.items()]
    received = sum(plan.bytes_received_per_rank[0].values()) / 1e6
    lines += [
        f"  speed-up of two ranks   {median['plain'] / median['split']:.3f}"
        f"   (ceiling {median['plain'] / median['ceiling']:.3f}, compute bound {plan.bound:.3f})",
        f"  share of the ceiling    {median['ceiling'] / median['split']:.3f}   (aim 0.93; per round "
        f"{statistics.median(shares):.3f}, {min(shares):.3f}–{max(shares):.3f})",
        f"  one rank against plain  {median['plain'] / median['captured']:.3f}   (aim 0.97)",
        f"  largest difference      {difference:.1e}   received per rank and call {received:.2f} MB",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
