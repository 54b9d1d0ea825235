"""What each rank of test_mesh.py runs under torchrun: `python -m tests.runtime.mesh_ranks FOLDER`.

Writes what it saw to FOLDER/<rank>.json.
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

RANK = os.environ["RANK"]


def main(folder: Path) -> None:
    """Compare a generation, whose first steps are exact, with the same ranks in lockstep."""
    torch.set_num_threads(1)
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
    runner = parallel._engine.programs.all()[0].loaded.runner
    kinds = sorted({type(channel).__name__ for channel in runner.channels(0)})
    found = {"equal": equal, "traffic": dict(parallel.traffic), "kinds": kinds}
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    parallel.close()
    apart.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
