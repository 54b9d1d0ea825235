"""What each rank of test_symmetric_memory.py runs.

    python -m tests.cuda.symmetric_ranks RANK WORLD FOLDER STEPS SCENARIO...

A scenario is a strategy, of which so many steps in CUDA graphs are compared with lockstep, or what goes wrong in one.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fxpass
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.step import EXACT, Step
from fxpass.models.small import case
from fxpass.runtime.board import Board
from fxpass.runtime.errors import RankError
from fxpass.runtime.graphs import StepGraphs, cuda_recorder
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import StepRunner
from fxpass.runtime.symmetric_memory import SymmetricChannel, SymmetricMemory, allocated
from tests.cuda.ranks import on, plain

DEVICE = torch.device("cuda:0")
LIMIT = {"killed": 4.0, "aborted": 60.0}  #: seconds that a wait may take on the device


def steps(count: int) -> list[Step]:
    """The first step is exact, and some others are."""
    chance = random.Random(1)
    return [
        EXACT if k == 0 or chance.random() < 0.2 else Step(0, False, chance.uniform(0.5, 1.5)) for k in range(count)
    ]


class Rank:
    """One rank of a small model, its steps in graphs; and all ranks in lockstep."""

    def __init__(self, rank: int, world: int, scenario: str) -> None:
        self.rank = rank
        self.scenario = scenario
        strategy = "displaced" if scenario in LIMIT else scenario
        self.model: Any = case("unet_sdxl").build().to(DEVICE)
        self.given = on(str(DEVICE), case("unet_sdxl").inputs(rows=32, seed=3, module=self.model))
        self.drift = torch.randn(self.given["sample"].shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        plan = fxpass.plan(fxpass.capture(self.model, **self.given), world_size=world, strategy=strategy)
        self.stale = plan.exact_steps is not None
        self.table = WeightTable(self.model, list(plan.program.weights.values()))
        self.memory: SymmetricMemory
        self.runner = StepRunner.of(plan, rank, DEVICE, Counter())
        self.runner.open(0, self.channels())
        self.graphs = StepGraphs([self.runner], 0, DEVICE, cuda_recorder(DEVICE))
        self.lockstep = LockstepExecutor(world).load(plan, self.table.tensors(), self.call(0).tensors)

    def channels(self) -> list[SymmetricChannel]:
        specs = self.runner.specs
        store = dist.PrefixStore(self.scenario, dist.distributed_c10d._get_default_store())
        board = Board(store, self.rank, dist.get_world_size(), LIMIT.get(self.scenario, 30.0))
        self.memory = allocated(specs, dist.group.WORLD, board, DEVICE, 1)
        return [SymmetricChannel(self.memory, i, spec) for i, spec in enumerate(specs)]

    def call(self, k: int) -> Call:
        return Call.of(self.model, (), self.given | {"sample": self.given["sample"] + 0.1 * k * self.drift})

    def step(self, k: int, step: Step) -> list[Tensor]:
        step = step if self.stale else EXACT
        mode = self.runner.mode(step)
        return self.graphs.run(self.table.tensors(), self.call(k).tensors, mode, step.pace)[0]

    def expected(self, k: int, step: Step) -> list[Tensor]:
        step = step if self.stale else EXACT
        return self.lockstep.run_all(self.table.tensors(), self.call(k).tensors, step)[self.rank]


def compare(rank: Rank, count: int) -> None:
    """All modes in turn equal lockstep, bit for bit, also after a weight changed in place; then how long each takes."""
    began = time.perf_counter()
    for k, step in enumerate(steps(count)):
        if k == count // 2:
            next(rank.model.parameters()).data.mul_(1.1)
        found, expected = rank.step(k, step), rank.expected(k, step)
        torch.cuda.synchronize()
        rank.memory.check()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), f"step {k} ({step}) differs by {(one - other).abs().max().item()}"
    seconds = time.perf_counter() - began
    print(f"{rank.scenario}, rank {rank.rank}: {count} steps in {seconds:.1f} s, graphs {sorted(rank.graphs.graphs)}")
    for name, step in (("exact", EXACT), ("displaced", Step(0, False, 1.0))):
        for k in range(3):
            rank.step(k, step)
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        for k in range(20):
            rank.step(k, step)
        torch.cuda.synchronize()
        if rank.rank == 0:
            print(f"{rank.scenario}, {name}: {(time.perf_counter() - began) * 50:.3f} ms a step")


def lose(rank: Rank, last: bool) -> None:
    """The last rank is gone after a few steps; the others hear it, and their GPU still works."""
    for k in range(8):
        rank.step(k, EXACT if k < 3 else Step(0, False, 1.0))
    torch.cuda.synchronize()
    dist.barrier()
    if last:
        os._exit(0)
    began = time.perf_counter()
    for k in range(3):
        rank.step(k, Step(0, False, 1.0))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    try:
        rank.memory.check()
    except RankError as error:
        assert torch.arange(10, device=DEVICE).sum().item() == 45
        print(f"rank {rank.rank} raised after {seconds:.2f} s: {error}")
        return
    raise AssertionError("nobody noticed that a rank was gone")


@torch.no_grad()
def main() -> None:
    number, world, folder, count, *scenarios = sys.argv[1:]
    plain(str(DEVICE))
    store = dist.FileStore(f"{folder}/store-{scenarios[0]}", int(world))
    dist.init_process_group("gloo", store=store, rank=int(number), world_size=int(world))
    for scenario in scenarios:
        rank = Rank(int(number), int(world), scenario)
        if scenario not in LIMIT:
            compare(rank, int(count))
        else:
            if scenario == "aborted":
                rank.step(0, EXACT)  # opens the memory
                threading.Timer(15.0, rank.memory.abort).start()
            lose(rank, last=int(number) == int(world) - 1)
        Path(folder, f"{scenario}-{number}").write_text("done")
        sys.stdout.flush()
    os._exit(0)  # a lost peer leaves the process group nothing to close


if __name__ == "__main__":
    main()
