"""Measure what people do with pipelines: the result after `parallelize` against that of the unsplit pipeline.

Each use is made before `parallelize`, and after it, when the pipeline has already run split. Some are also made after
it under a stale strategy, where the result must be that of the same use made before, with worker processes, and on the
ranks of torchrun.

    torchrun --nproc-per-node 2 -m fxpass.tools.sweeps.pipeline_uses NAME FOLDER    # each rank writes its outcome
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fxpass

from ...models.pipelines_zoo import Small
from ...models.pipelines_zoo.recipe import Recipe
from ...models.pipelines_zoo.uses import USES, Use, start
from ...runtime.errors import DisagreementError
from .pipelines_case import PICTURE, RANKS, difference

ORDERS = ("before", "after")
WIDELY = ("stale", "spawn", "torchrun")  #: of uses that are measured `widely`
#: arguments of `parallelize` by order; "rank" is what each rank of torchrun runs
OPTIONS: dict[str, dict[str, Any]] = {
    "stale": {"strategy": "displaced", "warmup_steps": 2},
    "spawn": {"executor": "spawn"},
    "rank": {"executor": "distributed"},
}
STEPS = Recipe(call={"num_inference_steps": 5})  #: two of them are stale: the last one is exact again


def orders_of(name: str) -> tuple[str, ...]:
    """The orders in which a use is measured."""
    if USES[name].breaks:
        return ("torchrun",)
    return (*ORDERS, *WIDELY) if USES[name].widely else ORDERS


def measure(name: str, key: str) -> dict[str, Any]:
    """All outcomes of a use as plain data."""
    found: dict[str, Any] = {"name": name, "key": key, "failed": ""}
    try:
        found |= {order: outcome(name, order) for order in orders_of(name)}
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return found


def outcome(name: str, order: str) -> str:
    """What comes of a use in one of its orders: `equal`, or what is wrong or missing."""
    use = USES[name]
    if use.missing:
        return f"needs {use.missing}"
    if order == "torchrun":
        return _on_ranks(name)
    steps, options = STEPS if order == "stale" else Recipe(), OPTIONS.get(order, {})
    exact = _longer(use.apply(start()), steps).run()
    expected = _split(use, "before", options, steps) if order == "stale" else exact
    try:
        found = _split(use, "before" if order == "before" else "after", options, steps)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"refused: {next(iter(str(error).splitlines()), '')}"
    if order == "stale" and difference(found, exact) <= PICTURE:
        return "no stale step"
    worst = difference(found, expected)
    return "equal" if worst <= PICTURE else f"differs by {worst:.0e}"


def _split(use: Use, order: str, options: dict[str, Any], steps: Recipe) -> list[Any]:
    """The result of a split pipeline with which this is done before or after `parallelize`."""
    small = start()
    if order == "before":
        small = use.apply(small)
    given: dict[str, Any] = {"executor": "lockstep"} | options
    split = fxpass.parallelize(small.pipeline, RANKS, **given)
    try:
        if order == "after":
            _longer(small, steps).run()
            small = _broken(small, use) if use.breaks else use.apply(small)
        return _longer(small, steps).run()
    finally:
        fxpass.restore(split)


def _broken(small: Small, use: Use) -> Small:
    """Do what ends in an error on one rank, which begins the next picture then: both ranks hear of it."""
    heard = False
    try:
        use.apply(small)
        small.run()
    except DisagreementError:
        heard = True
    if not heard:
        raise RuntimeError("a rank did not hear that the other one had left a picture")
    return small


def _longer(small: Small, steps: Recipe) -> Small:
    return Small(small.pipeline, small.recipe | steps)


def _on_ranks(name: str) -> str:
    """The outcome on the ranks of torchrun; all of them if they differ."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        done = subprocess.run(
            [*command, "-m", "fxpass.tools.sweeps.pipeline_uses", name, folder],
            capture_output=True,
            text=True,
            check=False,
        )
        found = [path.read_text() for path in sorted(Path(folder).iterdir())]
    if len(found) < RANKS or done.returncode:
        return f"failed: {(done.stderr.splitlines() or ['no output'])[-1]}"
    return " / ".join(dict.fromkeys(found))


def main() -> None:
    name, folder = sys.argv[1:]
    (Path(folder) / os.environ["RANK"]).write_text(outcome(name, "rank"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
