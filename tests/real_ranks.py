"""What each rank of test_processes.py runs under torchrun: `python -m tests.real_ranks FOLDER CASE:TRANSPORT…`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

import fxpass
from fxpass.models.small import case, output_tensors
from fxpass.runtime.process_group import GroupChannel
from fxpass.runtime.shared_memory import MemoryChannel


def main(folder: Path, jobs: list[str]) -> None:
    """Run every case twice (fresh inputs the second time, in inference mode), and save this rank's outputs."""
    torch.set_num_threads(1)
    for job in jobs:
        name, transport = job.split(":")
        os.environ["FXPASS_SHM_DISABLE"] = {"memory": "0", "gloo": "1"}[transport]
        model = case(name).build()
        parallel: Any = fxpass.parallelize(model, timeout=120)
        parallel(**case(name).inputs(rows=24, seed=1, module=model))
        with torch.inference_mode():
            found = output_tensors(parallel(**case(name).inputs(rows=24, seed=2, module=model)))
        torch.save(found, folder / f"{name}-{transport}-{os.environ['RANK']}.pt")
        runner = parallel._engine.programs.all()[0].loaded.steps.runners[0]
        kinds = {type(channel.between) for channel in runner.channels(0)}
        assert kinds == {{"memory": MemoryChannel, "gloo": GroupChannel}[transport]}
        parallel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
