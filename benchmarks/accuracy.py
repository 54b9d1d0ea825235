"""Predicted steps beside measured ones, on two one-thread ranks of this machine: `python -m benchmarks.accuracy`.

    python -m benchmarks.accuracy [--rounds 7] [--models unet mmdit] [--strategies sync displaced …]

The device and the links are calibrated first, in the same run; both ranks calibrate the device at the same time, as
they also compute at the same time. Then steps of all strategies alternate in rounds. The report has, for each, the
median of the measured steps, the prediction, and their ratio. With `FXPASS_SHM_DISABLE=1` gloo carries messages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from benchmarks.harness import contenders, heading, in_rounds, on_two_processes, steppers
from benchmarks.models import MODELS
from fxpass.ir.strategy import PRESETS
from fxpass.passes.targets import Device, Link, Target
from fxpass.predict.calibrate import device_of
from fxpass.predict.calibrate_links import links
from fxpass.runtime.shared_memory import DISABLE

LINK = "FXPASS_ACCURACY_LINK"  #: environment variable: the calibrated link as JSON
STEPS = 1  #: timed steps per turn, after an untimed one


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=PRESETS, default=list(PRESETS))
    options = parser.parse_args()
    if LINK not in os.environ:
        found = links()
        name = "gloo" if os.environ.get(DISABLE, "0") != "0" or "shm" not in found else "shm"
        os.environ[LINK] = json.dumps(asdict(found[name]))
    on_two_processes("benchmarks.accuracy", reports(options.models, tuple(options.strategies), options.rounds))


def reports(models: list[str], strategies: tuple[str, ...], rounds: int) -> Iterator[str]:
    """On both ranks: calibrate, then measure each model."""
    target = Target(slower(), Link(**json.loads(os.environ[LINK])))
    link = target.link
    yield f"{link.name}: {link.latency * 1e6:.0f} us, {link.bandwidth / 1e9:.2f} GB/s; {target.device.description}"
    for name in models:
        yield measure(name, strategies, target, rounds)


def slower() -> Device:
    """The device as both ranks measure it at the same time: of each figure the mean."""
    dist.barrier()
    mine = device_of("this", torch.device("cpu"), "shm")
    both: list[Device] = [mine, mine]
    dist.all_gather_object(both, mine)
    a, b = both
    return replace(
        a,
        matrix={name: (a.matrix[name] + b.matrix[name]) / 2 for name in a.matrix},
        reached={name: (a.reached[name] + b.reached[name]) / 2 for name in a.reached},
        bandwidth=(a.bandwidth + b.bandwidth) / 2,
        kernel=(a.kernel + b.kernel) / 2,
    )


@torch.no_grad()
def measure(name: str, strategies: tuple[str, ...], target: Target, rounds: int) -> str:
    model, ready = steppers(name, strategies)
    running = contenders(ready)
    seconds = in_rounds(running, rounds, STEPS)
    lines = [
        heading(name, model, f"{rounds} rounds, medians in seconds"),
        "  strategy              measured  predicted   ratio",
    ]
    for strategy, values in seconds.items():
        prediction = ready[strategy].plan.predict(target)
        predicted = (prediction.steady or prediction.exact).seconds
        measured = statistics.median(values)
        lines.append(f"  {strategy:<20} {measured:9.4f}  {predicted:9.4f}  {predicted / measured:6.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
