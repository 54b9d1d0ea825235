"""What each rank of test_cuda.py runs under torchrun, all of them on one GPU: `python -m tests.cuda.ranks FOLDER`.

Saves the outputs of every step to FOLDER. NCCL takes no two ranks on one GPU: gloo carries the messages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

import fxpass
from fxpass.models.small import case, output_tensors

NAMES = ("unet_sdxl", "sana")  # halos, keys and values, moments, sums
RUNS = [(name, strategy, False) for name in NAMES for strategy in ("sync", "displaced", "compressed")]
RUNS += [("unet_sdxl", "displaced", True)]


def plain(device: str) -> None:
    """Products in float32 are of float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.cuda.set_device(device)


def on(device: str, given: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), given)


def steps(name: str, device: str, **options: Any) -> list[list[Tensor]]:
    """Each step's outputs; the sample drifts, the timestep falls."""
    model: Any = case(name).build().to(device)
    given = on(device, case(name).inputs(rows=32, seed=3, module=model))
    key = "sample" if "sample" in given else "hidden_states"
    drift = torch.randn(given[key].shape, generator=torch.Generator().manual_seed(4)).to(device)
    if options.get("strategy") != "sync":
        options["warmup_steps"] = 2
    found = []
    with fxpass.parallelize(model, timeout=120, **options) as parallel:
        for k in range(5):
            time = (given["timestep"] * (1 - 0.1 * k)).to(given["timestep"].dtype)
            found.append(output_tensors(parallel(**given | {key: given[key] + 0.1 * k * drift, "timestep": time})))
    return [[value.cpu() for value in outputs] for outputs in found]


def main(folder: Path) -> None:
    plain("cuda:0")
    if os.environ["WORLD_SIZE"] == "1":  # fxpass initialises NCCL
        found = steps(NAMES[0], "cuda:0", strategy="sync", executor="distributed")
        assert dist.get_backend() == "nccl"
        torch.save(found, folder / "alone.pt")
        dist.destroy_process_group()
        return
    dist.init_process_group("gloo")
    for name, strategy, compiled in RUNS:
        found = steps(name, "cuda:0", strategy=strategy, compile=compiled)
        torch.save(found, folder / f"{name}-{strategy}-{compiled}-{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
