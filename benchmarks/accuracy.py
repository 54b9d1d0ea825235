"""Predicted steps beside measured ones, on two one-thread ranks of this machine: `python -m benchmarks.accuracy`.

    python -m benchmarks.accuracy [--rounds 7] [--models unet mmdit] [--strategies sync displaced …]
    python -m benchmarks.accuracy --rates 1gbit 300mbit 100mbit  # over an emulated network link

The links are calibrated first, in the same run. Then steps of all strategies, over all links, alternate in rounds; each
round also calibrates the device, on both ranks at the same time, as they also compute at the same time. The report has,
for each, the median of the measured steps, the prediction, and their ratio. With `FXPASS_SHM_DISABLE=1` gloo carries
messages; over emulated links (benchmarks/emulated_link.py) it always does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from benchmarks import emulated_link
from benchmarks.harness import contenders, heading, in_turns, on_two_processes, steppers, take_part
from benchmarks.models import MODELS
from fxpass.ir.strategy import PRESETS
from fxpass.passes.targets import Device, Link, Target
from fxpass.predict.calibrate import device_of
from fxpass.predict.calibrate_links import links, sockets
from fxpass.predict.link_rank import Measured, measured
from fxpass.runtime.board import Board
from fxpass.runtime.groups import connect
from fxpass.runtime.shared_memory import DISABLE

LINK = "FXPASS_ACCURACY_LINK"  #: environment variable: the calibrated link as JSON
STRATEGIES = [name for name, strategy in PRESETS.items() if not strategy.overlaps]  #: those of patches
STEPS = 1  #: timed steps per turn
BEFORE = 3  #: untimed ones
FILLING = 8  #: untimed ones over a limited link: until then it is not as full of messages as it will be
BURST = "1mbit"
TIMEOUT = 60.0  #: seconds that a rank waits for the other while the link is calibrated


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--rates", nargs="+", type=emulated_link.amount, help="per second, as in 300mbit")
    options = parser.parse_args()
    wanted = options.models, tuple(options.strategies), options.rounds
    if options.rates and "RANK" in os.environ:
        limits = [emulated_link.Link(rate, BURST) for rate in options.rates]
        take_part(reports(*wanted, limits))
    elif options.rates:
        emulated_link.on_linked_processes("benchmarks.accuracy")
    else:
        if LINK not in os.environ:
            found = links()
            name = "gloo" if os.environ.get(DISABLE, "0") != "0" or "shm" not in found else "shm"
            os.environ[LINK] = json.dumps(asdict(found[name]))
        on_two_processes("benchmarks.accuracy", reports(*wanted, [None]))


def reports(
    models: list[str], strategies: tuple[str, ...], rounds: int, limits: Sequence[emulated_link.Link | None]
) -> Iterator[str]:
    """On both ranks: calibrate, then measure each model.

    Args:
        limits: the limits of the emulated link that take turns; None: the link that was calibrated before.
    """
    ways = {limit: limited(limit) if limit else Link(**json.loads(os.environ[LINK])) for limit in limits}
    for link in ways.values():
        line = f"{link.name}: {link.latency * 1e6:.0f} us, {link.bandwidth / 1e6:.1f} MB/s"
        if link.late_bandwidth:
            line += f"; for the next step {link.late_latency * 1e6:.0f} us, {link.late_bandwidth / 1e6:.1f} MB/s"
            line += f", {link.busy_latency * 1e6:.0f} us for what is awaited meanwhile"
        if link.core_bandwidth:
            line += f"; of the cores {link.core_latency * 1e6:.0f} us, {link.core_bandwidth / 1e6:.0f} MB/s"
        yield line
    for name in models:
        yield measure(name, strategies, ways, rounds)


def limited(limit: emulated_link.Link) -> Link:
    """The link as both ranks measure it."""
    emulated_link.checked(limit)
    store = dist.PrefixStore(f"link/{limit.rate}", dist.distributed_c10d._get_default_store())
    board = Board(store, dist.get_rank(), dist.get_world_size(), TIMEOUT)
    mine = measured(connect(board, torch.device("cpu")))
    both: list[Measured] = [mine, mine]
    dist.all_gather_object(both, mine)
    return sockets(limit.rate, both, f"gloo over {limit}", 1)


def devices() -> list[Device]:
    """The device as each rank measures it, at the same time."""
    dist.barrier()
    mine = device_of("this", torch.device("cpu"), "shm")
    found: list[Device] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def mean_of(found: list[Device]) -> Device:
    """The mean of each figure."""
    first = found[0]
    return replace(
        first,
        matrix={name: statistics.mean(each.matrix[name] for each in found) for name in first.matrix},
        reached={name: statistics.mean(each.reached[name] for each in found) for name in first.reached},
        bandwidth=statistics.mean(each.bandwidth for each in found),
        elements={name: statistics.mean(each.elements[name] for each in found) for name in first.elements},
        kernel=statistics.mean(each.kernel for each in found),
    )


@torch.no_grad()
def measure(name: str, strategies: tuple[str, ...], ways: dict[emulated_link.Link | None, Link], rounds: int) -> str:
    """Run all strategies over all links in turns, and measure the device in each round; returns the report."""
    model, ready = steppers(name, strategies)
    running = contenders(ready)
    found: list[Device] = []
    seconds: dict[tuple[emulated_link.Link | None, str], list[float]] = {}
    for turn in range(rounds + 1):
        if turn:  # the first turn warms up
            found += devices()
        for limit in ways:
            if limit:
                emulated_link.set_up(limit)
            for strategy, taken in in_turns(running, turn, STEPS, FILLING if limit else BEFORE).items():
                if turn:
                    seconds.setdefault((limit, strategy), []).append(taken)
    device = mean_of(found)
    lines = [
        heading(name, model, f"{rounds} rounds, medians in seconds; {device.description}"),
        "  link        strategy              measured  predicted   ratio",
    ]
    for (limit, strategy), values in seconds.items():
        prediction = ready[strategy].plan.predict(Target(device, ways[limit]))
        predicted = (prediction.steady or prediction.exact).seconds
        middle = statistics.median(values)
        ratio = predicted / middle
        lines.append(f"  {ways[limit].name:<10}  {strategy:<20} {middle:9.4f}  {predicted:9.4f}  {ratio:6.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
