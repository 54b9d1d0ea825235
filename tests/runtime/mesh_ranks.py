"""What each rank of test_mesh.py runs under torchrun: `python -m tests.runtime.mesh_ranks FOLDER`.

Writes what it saw through shared memory, and then through gloo, to FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxpass
from tests.runtime.plans import block, steps, whole
from tests.runtime.ranks import attempt

RANK = os.environ["RANK"]


def pair(module: Any, one: Tensor, two: Tensor, timestep: Tensor, *, look: bool) -> None:
    """Two calls that run at once, unless the result of the first is looked at before."""
    first = module(one, timestep)["sample"]
    if look:
        first.mean().item()
    second = module(two, timestep)["sample"]
    for x, found in ((one, first), (two, second)):
        torch.testing.assert_close(found + 0, whole(block(), x, timestep))


def seen(disable: str) -> dict[str, Any]:
    """Compare a generation, whose first steps are exact, with the same ranks in lockstep.

    Args:
        disable: "1" not to use shared memory.
    """
    os.environ["FXPASS_SHM_DISABLE"] = disable
    named: dict[str, Any] = {"cfg": 2, "strategy": "displaced", "warmup_steps": 2}
    lockstep: Any = fxpass.parallelize(block(), 4, executor="lockstep", **named)
    parallel: Any = fxpass.parallelize(block(), timeout=120, **named)
    equal = [torch.equal(parallel(*call)["sample"], lockstep(*call)["sample"]) for call in steps(6)]
    apart: Any = fxpass.parallelize(block(), timeout=120, **named)
    alone: Any = fxpass.parallelize(block(), 4, executor="lockstep", **named)
    for sample, timestep in steps(6, seed=1):  # one call for each sample
        found, expected = ([each(x, timestep)["sample"] for x in sample.split(1)] for each in (apart, alone))
        equal += [torch.equal(a + 0, b + 0) for a, b in zip(found, expected, strict=True)]
    assert apart.plan.calls == 2
    one, two = sample.split(1)
    errors = [attempt(lambda look=look: pair(apart, one, two, timestep, look=look)) for look in (RANK == "0", False)]
    runner = parallel._engine.programs.all()[0].loaded.steps.runners[0]
    kinds = sorted({type(channel.between).__name__ for channel in runner.channels(0)})
    lines = sorted({len(getattr(channel.between, "members", ())) for channel in runner.channels(0)})
    found = {"equal": equal, "traffic": dict(parallel.traffic), "kinds": kinds, "lines": lines, "errors": errors}
    parallel.close()
    apart.close()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps([seen("0"), seen("1")]))
