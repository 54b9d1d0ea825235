"""Predictions beside measurements: `python -m benchmarks.predicted h100` and `python -m benchmarks.predicted a100`.

    h100    one H100, steps of whole models, and of the slowest rank's program alone without exchanges (docs/design.md)
    a100    DistriFusion's table (Li et al., 2024): SDXL, 50 steps, on up to 8 A100

With `--fit`, the figures of the device that its data sheet does not give are fitted to the rows of whole models alone:
the shares of the peak that operators reach, and the time of a kernel beside its work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from typing import Any

import fxpass
from fxpass.ir import comm
from fxpass.ir.program import Program, calls
from fxpass.models.resolve import Options, resolve
from fxpass.passes.lower_comm import StepPrograms
from fxpass.passes.targets import Device, Link, Target, find
from fxpass.predict.events import Step, Work, step_of
from fxpass.predict.prediction import Prediction
from fxpass.predict.price import Prices
from fxpass.predict.simulate import Simulation


@dataclass(frozen=True)
class Row:
    """A measured step or generation, in seconds."""

    model: str
    size: int  #: pixels of a side
    ranks: int  #: 1: the whole model
    seconds: float
    graphs: bool = True
    batch: int | None = None

    @property
    def whole(self) -> bool:
        return self.ranks == 1


#: torch 2.11; `graphs`: the eager step recorded as a CUDA graph
H100 = (
    Row("flux-dev", 1024, 1, 180e-3),
    Row("sdxl", 1024, 1, 43.2e-3),
    Row("sdxl", 2048, 1, 199e-3),
    Row("sdxl", 3840, 1, 1201e-3),
    Row("flux-dev", 1024, 8, 33.0e-3),
    Row("sdxl", 1024, 8, 16.3e-3),
    Row("sdxl", 2048, 2, 104.6e-3),
    Row("sdxl", 2048, 8, 34.7e-3),
    Row("sdxl", 3840, 8, 154e-3),
    Row("flux-dev", 1024, 1, 184e-3, graphs=False),
    Row("sdxl", 1024, 1, 67e-3, graphs=False),
    Row("sdxl", 2048, 1, 201e-3, graphs=False),
    Row("sdxl", 3840, 1, 1202e-3, graphs=False),
    Row("flux-dev", 1024, 8, 66e-3, graphs=False),
    Row("sdxl", 1024, 8, 61e-3, graphs=False),
    Row("sdxl", 2048, 2, 109e-3, graphs=False),
    Row("sdxl", 2048, 8, 64e-3, graphs=False),
    Row("sdxl", 3840, 8, 158e-3, graphs=False),
)
STEPS = 50
#: seconds of 50 steps on 1, 2, 4 and 8 GPUs, by pixels of a side
A100 = {1024: (5.02, 3.35, 2.26, 1.77), 2048: (23.7, 13.3, 7.60, 4.81), 3840: (140.0, 76.6, 41.3, 22.9)}


@cache
def captured(model: str, size: int, batch: int | None = None) -> Program:
    made = resolve(model, Options(size, size, None, batch))
    return fxpass.capture(made.module, *made.args, **made.kwargs)


@cache
def planned(model: str, size: int, ranks: int, batch: int | None = None, strategy: str = "sync") -> fxpass.Plan:
    return fxpass.plan(captured(model, size, batch), world_size=ranks, strategy=strategy, target="gpu")


@cache
def programs(model: str, size: int, ranks: int) -> Any:
    plan = planned(model, size, ranks)
    return plan, StepPrograms(plan.graph, 0)["exact"]


def without_exchanges(row: Row, device: Device) -> float:
    """Seconds of the slowest rank's step, alone: the results of exchanges are given."""
    plan, program = programs(row.model, row.size, row.ranks)
    link = Link("none", "", "ports", 0.0, 1e30)
    step = step_of(program, plan.graph, Prices(device, row.ranks), link, 0.0 if row.graphs else device.launch)
    exchanging = {node.name for node in calls(program.graph) if getattr(node.target, "__module__", "") == comm.__name__}
    events = tuple(event for event in step.events if isinstance(event, Work) and event.name not in exchanging)
    return float(Simulation(row.ranks, link).step(Step(events)).ended.max())


def h100(device: Device) -> None:
    print(f"{'model':<10} {'size':>5} {'ranks':>5}  {'launched':<10} {'measured':>9} {'predicted':>9}  (ms)")
    for row in H100:
        found = without_exchanges(row, device)
        kind = "as a graph" if row.graphs else "one by one"
        times = f"{row.seconds * 1e3:9.1f} {found * 1e3:9.1f}  {found / row.seconds:5.2f}"
        print(f"{row.model:<10} {row.size:>5} {row.ranks:>5}  {kind:<10} {times}", flush=True)


def generation(size: int, gpus: int, target: Target) -> float:
    """Seconds of a generation by DistriFusion's rules.

    One GPU computes a batch of both guidance branches. Of more, each half computes one branch, and all gather the
    output: the branches take the same time, so one of them is simulated.
    """
    if gpus == 1:
        return planned("sdxl", size, 1, 2).predict(target, graphs=True).generation(STEPS)
    plan = planned("sdxl", size, gpus // 2, 1, "corrected_async_gn")
    one: Prediction = plan.predict(target, graphs=True)
    output = size // 8 * size // 8 * 4 * 2  # bytes of a branch's prediction
    return one.generation(STEPS) + STEPS * target.message(output)


def a100(target: Target) -> None:
    print(f"{'size':>5} {'GPUs':>5} {'published':>10} {'predicted':>10}  (s, {STEPS} steps)")
    for size, published in A100.items():
        for gpus, seconds in zip((1, 2, 4, 8), published, strict=True):
            found = generation(size, gpus, target)
            print(f"{size:>5} {gpus:>5} {seconds:>10.2f} {found:>10.2f}  {found / seconds:5.2f}", flush=True)


def fitted(device: Device, rows: list[tuple[float, Callable[[Device], float]]]) -> Device:
    """The device whose predictions are nearest to measured seconds, by coordinate descent on logarithms."""

    usual = device

    def error(device: Device) -> float:
        distance = sum(log(found(device) / seconds) ** 2 for seconds, found in rows)
        return distance + 0.02 * sum(log(figure(device) / figure(usual)) ** 2 for figure, _ in FIGURES)

    best = error(device)
    size = 0.2
    while size > 0.01:
        improved = False
        for _, changed in FIGURES:
            for factor in (exp(size), exp(-size)):
                tried = changed(device, factor)
                if (found := error(tried)) < best:
                    device, best, improved = tried, found, True
        size = size if improved else size / 2
    return device


def _share(kind: Any) -> tuple[Callable[[Device], float], Callable[[Device, float], Device]]:
    def changed(device: Device, factor: float) -> Device:
        return replace(device, reached={**device.reached, kind: min(1.0, device.reached[kind] * factor)})

    return lambda device: device.reached[kind], changed


FIGURES: tuple[tuple[Callable[[Device], float], Callable[[Device, float], Device]], ...] = (
    *map(_share, ("product", "convolution", "attention")),
    (lambda device: device.kernel, lambda device, factor: replace(device, kernel=device.kernel * factor)),
)


def whole_models(which: str) -> Iterator[tuple[float, Callable[[Device], float]]]:
    """Measured seconds of the rows of whole models, and what predicts them."""
    if which == "h100":
        for row in H100:
            if row.whole and row.graphs:
                yield row.seconds, lambda device, row=row: without_exchanges(row, device)
    else:
        for size, (seconds, *_) in A100.items():
            row = Row("sdxl", size, 1, seconds / STEPS)
            yield row.seconds, lambda device, row=row: without_exchanges(row, device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("which", choices=("h100", "a100"))
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    target = find("H100" if options.which == "h100" else "A100-SXM")
    if options.fit:
        device = fitted(target.device, list(whole_models(options.which)))
        print(f"reached = {dict(device.reached)}, kernel = {device.kernel:.3g}")
        target = replace(target, device=device)
    if options.which == "h100":
        h100(target.device)
    else:
        a100(target)


if __name__ == "__main__":
    main()
