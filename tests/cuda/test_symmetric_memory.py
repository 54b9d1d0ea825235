"""Several processes on one GPU exchange messages inside CUDA graphs, through memory that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def _ranks(world: int, folder: Path, scenario: str) -> list[str]:
    """Run the scenario on `world` processes; their outputs."""
    environment = dict(os.environ) | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    command = [sys.executable, "-m", "tests.cuda.symmetric_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), scenario],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    print(*outputs, sep="\n")
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    return outputs


@pytest.mark.timeout(150)
@pytest.mark.parametrize("strategy", ["sync", "displaced", "compressed", "pcpp", "no_sync", "three displaced"])
def test_steps_in_graphs_equal_lockstep_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    world = 3 if strategy.startswith("three") else 2
    strategy = strategy.removeprefix("three ")
    _ranks(world, tmp_path, strategy)
    assert all((tmp_path / f"{strategy}-{rank}").exists() for rank in range(world))


@pytest.mark.timeout(150)
def test_a_killed_rank_ends_the_waits_of_the_others_after_the_timeout(tmp_path: Path) -> None:
    assert "another rank hangs or has ended" in _ranks(2, tmp_path, "killed")[0]
    assert (tmp_path / "killed-0").exists()


@pytest.mark.timeout(150)
def test_an_abort_by_the_host_ends_the_waits_on_the_device_at_once(tmp_path: Path) -> None:
    assert "was told to stop waiting" in _ranks(2, tmp_path, "aborted")[0]
    assert (tmp_path / "aborted-0").exists()
