"""What each rank of test_processes.py runs under torchrun: `python -m tests.real_ranks FOLDER CASE…`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

import fxpass
from fxpass.models.small import case, output_tensors


def main(folder: Path, names: list[str]) -> None:
    """Run every case twice (fresh inputs the second time, in inference mode), and save this rank's outputs."""
    torch.set_num_threads(1)
    for name in names:
        model = case(name).build()
        parallel: Any = fxpass.parallelize(model, timeout=120)
        parallel(**case(name).inputs(rows=24, seed=1, module=model))
        with torch.inference_mode():
            found = output_tensors(parallel(**case(name).inputs(rows=24, seed=2, module=model)))
        torch.save(found, folder / f"{name}-{os.environ['RANK']}.pt")
        parallel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
