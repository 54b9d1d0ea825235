"""What each rank of test_symmetric_memory.py runs: `python -m tests.cuda.symmetric_ranks RANK WORLD FOLDER SCENARIO`.

A toy step with many exchanges in a row: its exact form waits for what the others put in this step, its steady form uses
what they put in the step before. `reference` computes the same on one rank after the other.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fxpass.runtime.errors import RankError
from fxpass.runtime.symmetric_memory import SymmetricMemory

LAYERS, SIZE, STEPS = 12, 4096, 200
DEVICE = torch.device("cuda:0")


def modes(count: int) -> list[bool]:
    """Whether each step is exact: the first, and some others."""
    chance = random.Random(1)
    return [k == 0 or chance.random() < 0.2 for k in range(count)]


def start(rank: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(rank)).to(DEVICE)


def drifted(x: Tensor, step: int) -> Tensor:
    return x + 0.01 * step


def layer(x: Tensor, others: list[Tensor]) -> Tensor:
    """One rank's next value, from its own and the others' in rank order."""
    return torch.tanh(1.3 * x - 0.7 * torch.stack(others).mean(0)).roll(1)


def reference(world: int, exact: list[bool]) -> list[Tensor]:
    """The outputs of each step [world, SIZE]."""
    sent = [[torch.zeros(SIZE, device=DEVICE)] * LAYERS for _ in range(world)]
    outputs = []
    for step, now in enumerate(exact):
        values = [drifted(start(rank), step) for rank in range(world)]
        for k in range(LAYERS):
            own = [values[rank].clone() for rank in range(world)]
            there = own if now else [sent[rank][k] for rank in range(world)]
            values = [layer(values[r], [there[src] for src in range(world) if src != r]) for r in range(world)]
            for rank in range(world):
                sent[rank][k] = own[rank]
        outputs.append(torch.stack(values))
    return outputs


class Program:
    """A rank's step over symmetric memory, captured once for each mode and parity."""

    def __init__(self, memory: SymmetricMemory, rank: int, world: int) -> None:
        self.memory, self.rank, self.world = memory, rank, world
        self.input = start(rank)
        self.outputs = torch.zeros(world, SIZE, device=DEVICE)
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph] = {}
        self.number = 0

    def step(self, exact: bool, parity: int) -> None:
        memory, x = self.memory, self.input
        memory.begin()
        for k in range(LAYERS):
            if exact:
                self._put(k, parity, x)
            received = self._get(k, parity, 0 if exact else 1)
            y = layer(x, [part for part in received if part is not None])
            if not exact:
                self._put(k, parity, x)
            x = y
        self._put(LAYERS, parity, x)
        for src, part in enumerate(self._get(LAYERS, parity, 0)):
            self.outputs[src].copy_(x if part is None else part)

    def _put(self, channel: int, parity: int, x: Tensor) -> None:
        message = x.view(torch.uint8)
        self.memory.put(channel, parity, [None if dst == self.rank else message for dst in range(self.world)])

    def _get(self, channel: int, parity: int, age: int) -> list[Tensor | None]:
        return [m if m is None else m.view(torch.float32) for m in self.memory.get(channel, parity, age)]

    def capture(self) -> None:
        """Warm every kernel up, then record all four graphs; only then may a step run."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for parity in (1, 0):  # two whole steps, so that kernels are compiled
                self.step(True, parity)
                self.number += 1
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for exact in (True, False):
            for parity in (0, 1):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self.step(exact, parity)
                self.graphs[exact, parity] = graph
        torch.cuda.synchronize()

    def run(self, exact: bool) -> None:
        self.number += 1
        self.graphs[exact, self.number % 2].replay()


def compare(program: Program, rank: int, world: int) -> None:
    """All modes in turn, against the reference, bit for bit; then how long each takes."""
    exact = modes(STEPS)
    base, wrong = program.input.clone(), 0
    found = []
    for step, now in enumerate(exact):
        program.input.copy_(drifted(base, step))
        program.run(now)
        found.append(program.outputs.clone())
    torch.cuda.synchronize()
    program.memory.check()
    for step, (one, other) in enumerate(zip(found, reference(world, exact), strict=True)):
        if not torch.equal(one, other):
            wrong += 1
            if wrong == 1:
                print(f"rank {rank}: step {step} ({exact[step]}) differs by {(one - other).abs().max().item()}")
    assert wrong == 0, f"rank {rank}: {wrong} of {STEPS} steps differ"
    for name, mode in (("exact", True), ("steady", False)):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(50):
            program.run(mode)
        torch.cuda.synchronize()
        if rank == 0:
            print(f"{world} ranks, {name}: {(time.perf_counter() - began) * 20:.3f} ms a step of {LAYERS} exchanges")
    program.memory.check()


def lose(program: Program, rank: int, world: int, stop: Callable[[], None]) -> None:
    """The last rank is gone after a few steps; the others hear it, and their GPU still works."""
    for step in range(10):
        program.run(step == 0)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == world - 1:
        stop()
    began = time.perf_counter()
    for _ in range(3):
        program.run(False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    try:
        program.memory.check()
    except RankError as error:
        assert torch.arange(10, device=DEVICE).sum().item() == 45
        print(f"rank {rank} was told after {seconds:.2f} s: {error}")
        return
    raise AssertionError("nobody noticed that a rank was gone")


def main() -> None:
    rank, world, folder, scenario = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.cuda.set_device(DEVICE)
    store = dist.FileStore(str(folder / f"store-{scenario}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    message = 4 * SIZE
    sizes = [[[0 if s == d else message for s in range(world)] for d in range(world)] for _ in range(LAYERS + 1)]
    memory = SymmetricMemory(sizes, dist.group.WORLD, rank, DEVICE, timeout=30.0 if scenario == "compare" else 4.0)
    program = Program(memory, rank, world)
    began = time.perf_counter()
    program.capture()
    print(f"rank {rank}: captured in {time.perf_counter() - began:.2f} s, {memory.bytes} bytes of symmetric memory")
    dist.barrier()
    if scenario == "compare":
        compare(program, rank, world)
    elif scenario == "killed":
        lose(program, rank, world, lambda: os._exit(0))
    elif scenario == "aborted":
        import threading

        threading.Timer(1.0, memory.abort).start()
        lose(program, rank, world, lambda: os._exit(0))
    (folder / f"{scenario}-{rank}").write_text("done")
    sys.stdout.flush()
    os._exit(0)  # a lost peer leaves the process group nothing to close


if __name__ == "__main__":
    main()
