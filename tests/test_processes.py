"""Real models on real processes, torchrun's and spawned ones, give what lockstep gives, bit for bit."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxpass
from fxpass.models.small import case, output_tensors
from tests.torchrun import ranks

NAMES = ("unet_sdxl", "sana", "wan", "vae_decode")  # every kind of exchange: halos, K and V, moments, sums


@lru_cache
def lockstep(name: str, world: int) -> list[Tensor]:
    model = case(name).build()
    parallel: Any = fxpass.parallelize(model, world, executor="lockstep")
    return output_tensors(parallel(**case(name).inputs(rows=24, seed=2, module=model)))


def test_torchrun_gives_what_lockstep_gives_on_every_rank(tmp_path: Path) -> None:
    world = 3
    jobs = [f"{name}:memory" for name in NAMES] + [f"{NAMES[1]}:gloo"]
    ranks("tests.real_ranks", str(tmp_path), *jobs, world=world, imports=["fxpass.models.small"])
    for job in jobs:
        name, transport = job.split(":")
        for rank in range(world):
            found = torch.load(tmp_path / f"{name}-{transport}-{rank}.pt")
            for a, b in zip(found, lockstep(name, world), strict=True):
                assert torch.equal(a, b), f"{job} on rank {rank}"


def test_spawned_workers_give_what_lockstep_gives() -> None:
    world = 3
    for name in NAMES[:2]:
        model: Any = case(name).build()
        with fxpass.parallelize(model, world, executor="spawn", timeout=120) as parallel:
            found = output_tensors(parallel(**case(name).inputs(rows=24, seed=2, module=model)))
        for a, b in zip(found, lockstep(name, world), strict=True):
            assert torch.equal(a, b), name
