"""Measure what people do with pipelines: the result after `parallelize` against that of the unsplit pipeline.

Each use is made before `parallelize`, and after it, when the pipeline has already run split.
"""

from __future__ import annotations

from typing import Any

import fxpass

from ...models.pipelines_zoo.uses import USES, start
from .pipelines_case import PICTURE, RANKS, difference

ORDERS = ("before", "after")


def measure(name: str, key: str) -> dict[str, Any]:
    """Both outcomes of a use as plain data."""
    found: dict[str, Any] = {"name": name, "key": key, "failed": ""}
    try:
        found |= {order: outcome(name, order) for order in ORDERS}
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return found


def outcome(name: str, order: str) -> str:
    """What comes of a use that is made before or after `parallelize`: `equal`, or what is wrong or missing."""
    use = USES[name]
    if use.missing:
        return f"needs {use.missing}"
    expected = use.apply(start()).run()
    small = start()
    if order == "before":
        small = use.apply(small)
    fxpass.parallelize(small.pipeline, RANKS, executor="lockstep")
    if order == "after":
        small.run()
        small = use.apply(small)
    try:
        found = small.run()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"refused: {next(iter(str(error).splitlines()), '')}"
    worst = difference(found, expected)
    return "equal" if worst <= PICTURE else f"differs by {worst:.0e}"
