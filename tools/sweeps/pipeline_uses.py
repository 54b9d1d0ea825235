"""Measure what people do with pipelines: the result after `parallelize` against that of the unsplit pipeline.

Each use is made before `parallelize`, and after it, when the pipeline has already run split. Some are also made after
it under a stale strategy, where the result must be that of the same use made before, and with workers of their own.
"""

from __future__ import annotations

from typing import Any

import fxpass

from ...models.pipelines_zoo import Small
from ...models.pipelines_zoo.recipe import Recipe
from ...models.pipelines_zoo.uses import USES, Use, start
from .pipelines_case import PICTURE, RANKS, difference

ORDERS = ("before", "after")
WIDELY = ("stale", "spawn")  #: of uses that are measured `widely`
STALE = {"strategy": "displaced", "warmup_steps": 2}
STEPS = Recipe(call={"num_inference_steps": 5})  #: two of them are stale: the last one is exact again


def orders_of(name: str) -> tuple[str, ...]:
    """The orders in which a use is measured."""
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
    steps = STEPS if order == "stale" else Recipe()
    options = STALE if order == "stale" else {"executor": "spawn"} if order == "spawn" else {}
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
    split = fxpass.parallelize(small.pipeline, RANKS, **{"executor": "lockstep"} | options)
    try:
        if order == "after":
            _longer(small, steps).run()
            small = use.apply(small)
        return _longer(small, steps).run()
    finally:
        fxpass.restore(split)


def _longer(small: Small, steps: Recipe) -> Small:
    return Small(small.pipeline, small.recipe | steps)
