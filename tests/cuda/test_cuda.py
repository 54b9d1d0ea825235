"""What only a GPU shows: its kernels in every precision, its streams, Inductor's code for it, NCCL's interface."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fxpass
from fxpass.models.small import case, cases, output_tensors
from tests.cuda.ranks import NAMES, RUNS, on, steps
from tests.test_exact import EXACT, error
from tests.test_forms import cast, rms

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("plain_products"),
]
DEVICE = "cuda:0"


@pytest.mark.parametrize("name", [each.name for each in cases])
@torch.no_grad()
def test_every_small_model_is_exact_on_a_gpu(name: str) -> None:
    model: Any = case(name).build().to(DEVICE)
    parallel: Any = fxpass.parallelize(model, 3, executor="lockstep")
    for seed in (1, 2):
        given = on(DEVICE, case(name).inputs(rows=32, batch=2, seed=seed, module=model))
        for a, b in zip(output_tensors(parallel(**given)), output_tensors(model(**given)), strict=True):
            assert a.device == b.device
            assert error(a, b) <= EXACT
    assert not parallel.plan.fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [each.name for each in cases])
@torch.no_grad()
def test_low_precision_is_as_near_to_float32_as_unsplit(name: str, dtype: torch.dtype) -> None:
    model: Any = case(name).build().to(DEVICE)
    low = copy.deepcopy(model).to(dtype)
    given = on(DEVICE, case(name).inputs(rows=32, batch=2, seed=1, module=model))
    lower = cast(given, dtype)
    found = output_tensors(fxpass.parallelize(low, 3, executor="lockstep")(**lower))
    for a, b, wanted in zip(found, output_tensors(low(**lower)), output_tensors(model(**given)), strict=True):
        assert a.dtype == b.dtype
        assert 0 < rms(a, wanted) <= 2 * rms(b, wanted)


def _torchrun(world: int, folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*torchrun, "-m", "tests.cuda.ranks", str(folder)]
    environment = dict(os.environ) | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=270, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.timeout(280)
def test_one_process_goes_through_nccl(tmp_path: Path) -> None:
    _torchrun(1, tmp_path)
    expected = steps(NAMES[0], DEVICE, strategy="sync", world_size=1, executor="lockstep")
    for one, other in zip(torch.load(tmp_path / "alone.pt"), expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert error(a, b) <= EXACT


@pytest.mark.timeout(280)
def test_processes_on_a_gpu_equal_lockstep_at_every_step(tmp_path: Path) -> None:
    _torchrun(2, tmp_path)
    for name, strategy, compiled in RUNS:
        expected = steps(name, DEVICE, strategy=strategy, world_size=2, executor="lockstep")
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}-{strategy}-{compiled}-{rank}.pt")
            for one, other in zip(found, expected, strict=True):
                for a, b in zip(one, other, strict=True):
                    assert error(a, b) <= EXACT, (name, strategy, compiled, rank)


@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", ["unet_sdxl", "flux"])
@torch.no_grad()
def test_one_rank_is_compiled_for_a_gpu(name: str) -> None:
    model: Any = case(name).build().to(DEVICE)
    with fxpass.parallelize(model, 1, compile=True) as parallel:
        for seed in (1, 2):
            given = on(DEVICE, case(name).inputs(rows=32, seed=seed, module=model))
            for a, b in zip(output_tensors(parallel(**given)), output_tensors(model(**given)), strict=True):
                assert error(a, b) <= EXACT
        assert parallel.compile_reports


def test_nccl_has_the_interface_that_channels_use(tmp_path: Path) -> None:
    """A group of one rank: NCCL takes no two on a GPU."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=60)
    group: Any = dist.ProcessGroupNCCL(dist.PrefixStore("group", store), 0, 1, options)
    send = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8, device=DEVICE)
    for launch in (
        lambda into: group._allgather_base(into, send),
        lambda into: group.alltoall_base(into, send, [len(send)], [len(send)]),
    ):
        receive = torch.zeros_like(send)
        work = launch(receive)
        work.wait()
        assert torch.equal(receive, send)
        assert work.is_completed()
