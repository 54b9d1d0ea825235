"""What each process of test_patches.py runs under torchrun: `python -m tests.runtime.patch_ranks FOLDER`.

Writes what it saw to FOLDER/<process>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import fxpass
from tests.runtime.plans import block, steps

STRATEGIES = ("sync", "displaced", "compressed", "pcpp")
ROWS = 32


def named(strategy: str) -> dict[str, Any]:
    return {"strategy": strategy} | ({} if strategy == "sync" else {"warmup_steps": 2})


def parallel(world: int | None, **options: Any) -> Any:
    return fxpass.parallelize(block(), world, **options)


def equal(module: Any, expected: Any, rows: int = ROWS) -> bool:
    """Whether two modules give the same bits, in exact and displaced steps of two generations."""
    calls = [*steps(5, rows=rows), *steps(3, rows=rows, seed=1)]
    return all(torch.equal(module(*call)["sample"], expected(*call)["sample"]) for call in calls)


def seen(disable: str) -> dict[str, Any]:
    """Which strategies are equal to lockstep, and by which channels.

    Args:
        disable: "1" not to use shared memory.
    """
    os.environ["FXPASS_SHM_DISABLE"] = disable
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        with parallel(None, patches=8, timeout=60, **named(strategy)) as module:
            found[strategy] = equal(module, parallel(8, executor="lockstep", **named(strategy)))
            channels = module._engine.programs.all()[0].loaded.steps.runners[0].channels(0)
            found["kinds"] = sorted({type(channel.between).__name__ for channel in channels})
    grouped: dict[str, Any] = {"cfg": 2, **named("displaced")}
    with parallel(None, patches=3, timeout=60, **grouped) as module:
        found["groups"] = equal(module, parallel(6, executor="lockstep", **grouped), 24)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([seen("0"), seen("1")]))
