"""Shared memory is counted before it is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from fxpass.ir.merge import Merged
from fxpass.ir.mesh import Placement
from fxpass.ir.step import ChannelSpec
from fxpass.runtime import memory
from fxpass.runtime.board import Board
from fxpass.runtime.memory import available, check_shm
from fxpass.runtime.shared_memory import open_channels
from fxpass.runtime.spawn import SpawnExecutor
from tests.runtime.plans import block, inputs, parallel


def test_too_little_shared_memory_is_an_error_before_any_step() -> None:
    with pytest.raises(OSError, match=r"weights needs .* MiB of shared memory, /dev/shm has .*--shm-size"):
        check_shm(1 << 60, "sharing the weights")


def test_inputs_that_do_not_fit_into_shared_memory_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr("fxpass.runtime.spawn.check_shm", lambda size, what: asked.append((size, what)))
    with parallel(block(), SpawnExecutor(2, timeout=60)) as module:
        module(*inputs())
    given = sum(tensor.nbytes for tensor in inputs())
    assert any("inputs" in what and size >= given for size, what in asked)


def test_messages_that_do_not_fit_into_memory_are_refused_with_both_sizes_before_a_file_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("fxpass.runtime.shared_memory._create", lambda *_: made.append(None))
    total = Merged("moments", (1 << 40,), torch.float32, 2)
    spec = ChannelSpec("exchange", "", (total,), late=False)
    with pytest.raises(OSError, match=r"two buffers for each message of 2 ranks needs 16777216\.\d MiB of memory, "):
        open_channels([spec], Board(HashStore(), 0, 2, 1.0), 1, Placement.one_each(2))
    assert not made


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str, str], None]:
    """Writes a file of a machine under the test's folder."""

    def write(name: str, text: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/meminfo", "MemTotal:  4000 kB\nMemAvailable:  3000 kB\n")
    return write


def test_a_machine_without_limits_has_what_it_says_is_available(
    machine: Callable[[str, str], None], tmp_path: Path
) -> None:
    assert available(tmp_path) == 3000 * 1024
    machine("proc/self/cgroup", "0::/job/step\n")
    machine("sys/fs/cgroup/job/memory.max", "max\n")
    machine("sys/fs/cgroup/job/memory.current", "10\n")
    assert available(tmp_path) == 3000 * 1024


def test_the_limit_of_a_container_counts_less_what_it_uses_but_for_cached_files(
    machine: Callable[[str, str], None], tmp_path: Path
) -> None:
    machine("proc/self/cgroup", "0::/job/step\n")
    machine("sys/fs/cgroup/job/memory.max", "2000000\n")
    machine("sys/fs/cgroup/job/memory.current", "1500000\n")
    machine("sys/fs/cgroup/job/memory.stat", "anon 1000000\ninactive_file 300000\n")
    assert available(tmp_path) == 800_000


def test_no_plan_is_refused_where_the_available_memory_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available(tmp_path) is None
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.check_available(1 << 60, "everything", "run less")
