"""What test_spawn.py runs as a user's script, without torchrun: `python -m tests.cuda.spawned SCENARIO`.

All ranks are on one GPU (`TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1`). Some scenarios leave their modules open, so
that the end of the process has to close them.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import torch
from torch import Tensor, nn

import fxpass
from fxpass.models.small import case, output_tensors
from fxpass.runtime.errors import RankError
from fxpass.runtime.shared_memory import DISABLE
from tests.cuda.ranks import NAMES, on, plain, steps
from tests.runtime.plans import block
from tests.test_exact import EXACT, error

DEVICE = "cuda:0"
WORLD = 2  # processes on one GPU take turns: each more makes all slower


class Timed(nn.Module):
    """A denoiser that moves its timestep to its sample, as those of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block()

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return self.block(sample, timestep.to(sample.device).reshape(-1))


def parallel(model: nn.Module, world: int = WORLD, **options: Any) -> Any:
    return fxpass.parallelize(model, world, executor="spawn", timeout=60, **options)


def unet() -> tuple[Any, dict[str, Any]]:
    model: Any = case("unet_sdxl").build().to(DEVICE)
    return model, on(DEVICE, case("unet_sdxl").inputs(rows=32, seed=3, module=model))


def check(found: Any, expected: Any, what: str) -> None:
    for one, other in zip(output_tensors(found), output_tensors(expected), strict=True):
        assert one.device == other.device, f"{what}: on {one.device}, not on {other.device}"
        assert error(one, other) <= EXACT, f"{what}: off by {error(one, other)}"


def same_steps(found: list[list[Tensor]], expected: list[list[Tensor]], what: str) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(one, other, strict=True):
            assert error(a, b) <= EXACT, f"{what}, step {number}: off by {error(a, b)}"


def eager() -> None:
    """Displaced steps, also through gloo; exact ones with inputs of every kind; the last module is left open."""
    options = {"strategy": "displaced", "world_size": WORLD}
    for name in NAMES:
        expected = steps(name, DEVICE, executor="lockstep", **options)
        same_steps(steps(name, DEVICE, executor="spawn", **options), expected, f"{name} displaced")
    os.environ[DISABLE] = "1"
    found = steps(name, DEVICE, executor="spawn", compile="graph", **options)  # warns that there are no graphs
    same_steps(found, expected, f"{name} through gloo")
    del os.environ[DISABLE]
    model = Timed().eval().to(DEVICE)
    sample = torch.randn(2, 4, 8, 32, device=DEVICE)
    module = parallel(model)
    for given in (
        sample.mT,
        sample.mT.contiguous(memory_format=torch.channels_last),
        sample.mT[:1].expand(2, -1, -1, -1),
    ):
        for number in (torch.tensor([0.3], device=DEVICE), torch.tensor(0.4), torch.tensor([2, 3]), torch.tensor(True)):
            for timestep in (number, number.to(DEVICE)):
                check(module(given, timestep), model(given, timestep), f"{given.stride()} at {timestep}")
    try:
        parallel(model, 2)(sample.mT.cpu(), torch.tensor(0.3))
    except RuntimeError as failure:
        text = "".join(traceback.format_exception(failure))
        assert "input sample is on cpu, the model on cuda:0" in text, text
    else:
        raise AssertionError("an input on the CPU was taken by a model on a GPU")


def graphs() -> None:
    """Steps are replayed, also after weights changed in place, which no new recording follows."""
    expected = steps(NAMES[0], DEVICE, strategy="displaced", world_size=WORLD, executor="lockstep")
    options = {"strategy": "displaced", "world_size": WORLD, "executor": "spawn"}
    same_steps(steps(NAMES[0], DEVICE, compile="graph", **options), expected, "displaced as graphs")
    model, given = unet()
    module = parallel(model, compile="graph")
    weight = model.conv_in.weight
    low = 0.1 * torch.randn_like(weight)
    for _ in range(4):
        check(module(**given), model(**given), "as graphs")
    (entry,) = module._engine.programs.all()
    recorded = dict(entry.loaded.steps._graphs[0].graphs)
    assert len(recorded) == 2, f"{list(recorded)}: one for each parity"
    with torch.no_grad():
        weight.add_(low)
    check(module(**given), model(**given), "after an adapter was added in place")
    weight.data.sub_(low)
    check(module(**given), model(**given), "after it was taken away by .data")
    with module.generation():
        check(module(**given), model(**given), "in a generation")
        with torch.no_grad():
            weight.add_(low)
        check(module(**given), model(**given), "after an adapter was switched in the middle of a generation")
    now = entry.loaded.steps._graphs[0].graphs
    assert now.keys() == recorded.keys()
    assert all(now[key] is recorded[key] for key in now), "recorded again"
    weight.data = weight.data.clone()
    for _ in range(3):
        check(module(**given), model(**given), "after a weight moved")
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        module(**given)
    assert torch.cuda.memory_allocated() == before
    module.close()


def compiled() -> None:
    """Inductor compiles the segments of a small model on both ranks, and steps are graphs."""
    model = block().to(DEVICE)
    expected = fxpass.parallelize(copy.deepcopy(model), 2, executor="lockstep", strategy="displaced", warmup_steps=2)
    module = parallel(model, 2, strategy="displaced", warmup_steps=2, compile=True)
    generator = torch.Generator().manual_seed(4)
    sample, drift = (torch.randn(2, 4, 32, 8, generator=generator).to(DEVICE) for _ in range(2))
    for k in range(9):
        given = sample + 0.1 * k * drift, torch.tensor([0.9 - 0.1 * k], device=DEVICE)
        check(module(*given)["sample"], expected(*given)["sample"], f"step {k}")
    (entry,) = module._engine.programs.all()
    assert next(iter(entry.loaded.steps._graphs.values())).graphs
    assert module.compile_reports[0].segments
    assert module.traffic["halo"]


def lost() -> None:
    """A worker is killed between calls, in a call, or stopped: an error within 10 s, and the GPU works afterwards."""
    model, sample = block().to(DEVICE), torch.randn(2, 4, 32, 8, device=DEVICE)
    given = {"sample": sample, "timestep": torch.tensor([0.3], device=DEVICE)}
    for how in ("killed between calls", "killed in a call", "stopped"):
        module = parallel(model, 3, compile="graph")
        for _ in range(3):
            module(**given)
        child = module._engine.executor.processes[-1].pid
        if how == "killed between calls":
            os.kill(child, signal.SIGKILL)
        else:
            os.kill(child, signal.SIGSTOP)
        if how == "killed in a call":
            threading.Timer(0.5, os.kill, (child, signal.SIGKILL)).start()
        began = time.monotonic()
        try:
            module(**given)
        except RankError as failure:
            seconds = time.monotonic() - began
            print(f"{how}: {seconds:.1f} s: {str(failure).splitlines()[0]}")
            words = "process is stopped" if how == "stopped" else "killed by SIGKILL"
            assert words in str(failure), failure  # noqa: PT017
            assert seconds < 10, f"{how}: noticed after {seconds:.1f} s"
        else:
            raise AssertionError(f"nobody noticed that a worker was {how}")
        torch.cuda.synchronize()
        assert torch.arange(10, device=DEVICE).sum().item() == 45
        module.close()
    module = parallel(model)  # new workers meet this process again
    check(module(**given), model(**given), "new workers")


SCENARIOS = {"eager": eager, "graphs": graphs, "compiled": compiled, "lost": lost}

if __name__ == "__main__":
    began = time.monotonic()
    plain(DEVICE)
    with torch.no_grad():
        SCENARIOS[sys.argv[1]]()
    print(f"{sys.argv[1]} done after {time.monotonic() - began:.0f} s", flush=True)
