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
    runner = parallel._engine._all()[0].loaded.runner
    kinds = sorted({type(channel).__name__ for channel in runner.channels(0)})
    found = {"equal": equal, "traffic": dict(parallel.traffic), "kinds": kinds}
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    parallel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
