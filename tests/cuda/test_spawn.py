"""Plain Python drives workers on a GPU: the ranks share it, and their messages go through memory that both map."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SECONDS = 150  #: for all scenarios, which run at the same time


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The processes of all scenarios."""
    environment = dict(os.environ) | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.cuda.spawned", name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("eager", "graphs", "compiled", "lost")
    }
    yield running
    for each in running.values():
        each.kill()
        each.wait()


def ends_well(script: subprocess.Popen[str], name: str) -> str:
    """What a script has printed, once it has ended."""
    began = time.monotonic()
    output, _ = script.communicate(timeout=SECONDS)
    print(output)
    assert script.returncode == 0, f"exit code {script.returncode} after {time.monotonic() - began:.0f} s:\n{output}"
    assert f"{name} done" in output
    assert "Traceback" not in output.partition(f"{name} done")[2], "at the end of the process"
    return output


@pytest.mark.timeout(SECONDS + 20)
def test_steps_are_those_of_the_model_for_inputs_of_any_layout_and_on_the_host(
    scripts: dict[str, subprocess.Popen[str]],
) -> None:
    assert "without CUDA graphs" in ends_well(scripts["eager"], "eager")


@pytest.mark.timeout(SECONDS + 20)
def test_graphs_replay_in_the_workers_and_weights_changed_in_place_reach_them(
    scripts: dict[str, subprocess.Popen[str]],
) -> None:
    assert "without CUDA graphs" not in ends_well(scripts["graphs"], "graphs")


@pytest.mark.timeout(SECONDS + 20)
def test_workers_compile_their_segments(scripts: dict[str, subprocess.Popen[str]]) -> None:
    assert "cannot be recorded" not in ends_well(scripts["compiled"], "compiled")


@pytest.mark.timeout(SECONDS + 20)
def test_a_lost_worker_is_an_error_within_ten_seconds_and_the_gpu_works_afterwards(
    scripts: dict[str, subprocess.Popen[str]],
) -> None:
    ends_well(scripts["lost"], "lost")
