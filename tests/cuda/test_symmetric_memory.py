"""Several processes on one GPU exchange messages inside CUDA graphs, through memory that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


STRATEGIES = "sync", "displaced", "compressed", "pcpp", "no_sync"


def _ranks(world: int, folder: Path, *scenarios: str) -> list[str]:
    """Run scenarios on `world` processes; their outputs."""
    environment = dict(os.environ) | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    command = [sys.executable, "-m", "tests.cuda.symmetric_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), "200", *scenarios],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=60 + 60 * len(scenarios))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    print(*outputs, sep="\n")
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    return outputs


@pytest.mark.timeout(400)
def test_steps_in_graphs_equal_lockstep_bit_for_bit(tmp_path: Path) -> None:
    _ranks(2, tmp_path, *STRATEGIES)
    assert all((tmp_path / f"{strategy}-{rank}").exists() for rank in (0, 1) for strategy in STRATEGIES)


@pytest.mark.timeout(150)
def test_steps_of_three_ranks_in_graphs_equal_lockstep_bit_for_bit(tmp_path: Path) -> None:
    _ranks(3, tmp_path, "displaced")
    assert all((tmp_path / f"displaced-{rank}").exists() for rank in range(3))


@pytest.mark.timeout(150)
def test_a_killed_rank_ends_the_waits_of_the_others_after_the_timeout(tmp_path: Path) -> None:
    assert "another rank hangs or has ended" in _ranks(2, tmp_path, "killed")[0]
    assert (tmp_path / "killed-0").exists()


@pytest.mark.timeout(150)
def test_an_abort_by_the_host_ends_the_waits_on_the_device_at_once(tmp_path: Path) -> None:
    assert "was told to stop waiting" in _ranks(2, tmp_path, "aborted")[0]
    assert (tmp_path / "aborted-0").exists()
