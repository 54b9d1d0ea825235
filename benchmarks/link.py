"""`make bench-link`: run the UNet on two ranks over a network link, and report the share of its unlimited speed.

    python -m benchmarks.link [--rounds 10] [--rates 1gbit 300mbit]
    python -m benchmarks.link --trace steps.json [--rates 300mbit]

The link is emulated (benchmarks/emulated_link.py). Every round goes through all rates, "loopback" (the same devices,
unlimited) first; at each rate "displaced", "compressed", "no_sync" and "sync" alternate, so that other load on the
machine affects all of them.

DistriFusion's code, with bursts of 256 kbit, kept 0.90 (1 Gbit/s) and 0.72 (300 Mbit/s) of its speed, in its sync
mode 0.80 and 0.61.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.emulated_link import LOOPBACK, Link, amount, checked, on_linked_processes, set_up
from benchmarks.harness import contenders, heading, in_turns, ratio, spread, steppers, take_part
from benchmarks.trace import trace

STRATEGIES = ("displaced", "compressed", "no_sync", "sync")
STEPS = 1  #: timed steps per turn, after an untimed one
AIM = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description="two ranks over an emulated network link")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--rates", nargs="+", type=amount, default=["1gbit", "300mbit"], help="per second, as in 300mbit"
    )
    parser.add_argument("--burst", type=amount, default="1mbit", help="burst size, for example 256kbit")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of two steps per rate instead")
    options = parser.parse_args()
    if "RANK" in os.environ:
        links = [Link(rate, options.burst) for rate in [LOOPBACK, *options.rates]]
        take_part(traced(links, options.trace) if options.trace else measure(links, options.rounds))
    else:
        on_linked_processes("benchmarks.link")


@torch.no_grad()
def measure(links: list[Link], rounds: int) -> Iterator[str]:
    """Run all strategies over all links in turns; returns the report."""
    model, ready = steppers("unet", STRATEGIES)
    running = contenders(ready)
    reached = {link: checked(link) for link in links}
    seconds: dict[tuple[Link, str], list[float]] = {(link, name): [] for link in links for name in STRATEGIES}
    for turn in range(rounds + 1):
        for link in links:
            set_up(link)
            found = in_turns(running, turn, STEPS)
            if turn:  # the first turn warms up
                for name in STRATEGIES:
                    seconds[link, name].append(found[name])
    lines = [heading("unet", model, f"{rounds} rounds of {STEPS} steps, medians (min–max) in seconds per step")]
    for link in links:
        lines.append(f"  {link}: a plain transfer reaches {reached[link] / 1e6:.0f} Mbit/s")
        for name in STRATEGIES:
            line = f"    {name:<9} {spread(seconds[link, name])}"
            if link.rate != LOOPBACK:
                line += f"   keeps {ratio(seconds[links[0], name], seconds[link, name])}"
                line += f"   aim: at least {AIM}" if name == "displaced" else ""
            lines.append(line)
        lines.append(f"    displaced / no_sync  {ratio(seconds[link, 'displaced'], seconds[link, 'no_sync'])}")
    yield "\n".join(lines)


@torch.no_grad()
def traced(links: list[Link], file: Path) -> Iterator[str]:
    """Record two displaced steps over each link next to `file`, with the rate in the name; returns rank 0's tables."""
    _, ready = steppers("unet", ("displaced",))
    for link in links:
        reached = checked(link)
        seen = trace(ready["displaced"])
        yield f"{link.rate}, {reached / 1e6:.0f} Mbit/s: {seen.written(file, link.rate)}" if seen else ""


if __name__ == "__main__":
    main()
