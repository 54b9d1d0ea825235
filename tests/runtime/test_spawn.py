"""This process drives workers: exact, sharing memory, and leaving nothing behind."""

import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpass
from fxpass.models.small import case
from fxpass.runtime.calls.engine import Engine
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.calls.programs import SIGNATURES
from fxpass.runtime.errors import RankError
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.spawn import SpawnExecutor
from fxpass.runtime.wire import Connection
from tests.runtime.plans import Block, block, broken_on_rank_1, cut_plan, inputs, parallel, whole

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def pids(module: ParallelModule) -> list[int]:
    return [process.pid for process in module._engine.executor.processes]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Block, ParallelModule]]:
    """A model and itself on two processes, which start as they do for users; used by many tests."""
    model = block()
    with parallel(model, SpawnExecutor(2, timeout=60)) as module:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fxpass.runtime.workers.subprocess", subprocess)
            module(*inputs())
        yield model, module


def same_as_lockstep(model: nn.Module, module: ParallelModule, rows: int = 16, seed: int = 0) -> bool:
    lockstep = parallel(model, LockstepExecutor(module._engine.executor.world_size))
    expected = lockstep(*inputs(rows, seed))["sample"]
    torch.testing.assert_close(expected, whole(model, *inputs(rows, seed)))
    return torch.equal(module(*inputs(rows, seed))["sample"], expected)


def test_spawn_equals_lockstep_bit_for_bit(pair: tuple[Block, ParallelModule]) -> None:
    for seed in (0, 1):
        assert same_as_lockstep(*pair, seed=seed)


@pytest.mark.usefixtures("new_processes")
def test_three_processes_with_uneven_parts() -> None:
    model = block()
    with parallel(model, SpawnExecutor(3, timeout=60)) as module:
        assert same_as_lockstep(model, module, rows=22)
        children = pids(module)
        assert len(children) == 2
        assert all(map(alive, children))
    assert gone(children, 0.1)


def test_a_process_that_cannot_be_started_ends_those_before_it_and_later_calls_say_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, started = subprocess.Popen, []

    def started_once(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(start(*args, **kwargs))
        return started[0]

    monkeypatch.setattr("fxpass.runtime.workers.subprocess.Popen", started_once)
    with parallel(block(), SpawnExecutor(3, timeout=60)) as module:
        with pytest.raises(OSError, match="no more processes"):
            module(*inputs())
        assert started[0].poll() is not None
        with pytest.raises(RuntimeError, match="at their start: no more processes"):
            module(*inputs())
        assert len(started) == 1


def test_weights_are_shared_and_their_changes_seen(pair: tuple[Block, ParallelModule]) -> None:
    model, module = pair
    alias = model.conv_in.weight.detach()
    assert same_as_lockstep(model, module)
    assert all(p.is_shared() for p in model.parameters())
    assert alias.data_ptr() == model.conv_in.weight.data_ptr()  # in place: other views of the memory are still views
    with torch.no_grad():
        alias.mul_(1.5)
    assert same_as_lockstep(model, module)
    model.conv_in.weight.data = torch.randn_like(model.conv_in.weight)
    assert same_as_lockstep(model, module)
    assert same_as_lockstep(model, module)


def test_a_weight_replaced_by_a_view_of_itself_is_read_as_that_view(pair: tuple[Block, ParallelModule]) -> None:
    model, module = pair
    assert same_as_lockstep(model, module)
    model.key.weight.data = model.key.weight.data.t()  # square: the address, the shape and the dtype stay the same
    assert same_as_lockstep(model, module)
    model.value.weight.data = -model.value.weight.data
    model.value.weight.data = torch._neg_view(model.value.weight.data)
    assert same_as_lockstep(model, module)


def test_a_changed_structure_reaches_the_workers(pair: tuple[Block, ParallelModule]) -> None:
    model, module = pair
    assert same_as_lockstep(model, module)
    model.value = nn.Sequential(model.value, nn.Linear(16, 16))
    assert same_as_lockstep(model, module)
    sent = module._engine.executor._weights.names()
    assert "value.0.weight" in sent
    assert "value.weight" not in sent


@pytest.mark.filterwarnings("ignore:.* is captured again")
def test_programs_in_the_workers_are_bounded(pair: tuple[Block, ParallelModule]) -> None:
    model, module = pair
    for rows in range(16, 16 + 2 * (SIGNATURES + 2), 2):
        module(*inputs(rows))
    assert len(module._engine.executor._plans) == SIGNATURES
    assert same_as_lockstep(model, module)


def test_a_real_denoiser_in_half_precision() -> None:
    model: Any = case("unet_sdxl").build()
    example = case("unet_sdxl").inputs(32, module=model)
    model.to(torch.bfloat16)
    example = pytree.tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, example)
    with fxpass.parallelize(model, 2, executor="spawn", timeout=60) as module:
        found = module(**example).sample
        expected = fxpass.parallelize(model, 2, executor="lockstep")(**example).sample
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)


def test_a_worker_that_died_between_calls_is_named() -> None:
    module = parallel(block(), SpawnExecutor(2, timeout=60))
    module(*inputs())
    (child,) = pids(module)
    os.kill(child, signal.SIGKILL)
    assert gone([child])
    with pytest.raises(RankError, match=rf"rank 1 failed: its process \({child}\) was killed by SIGKILL"):
        module(*inputs(18))


def test_nan_inputs_give_nan_outputs(pair: tuple[Block, ParallelModule]) -> None:
    _, module = pair
    sample, timestep = inputs()
    sample[0, 0, -1, 0] = float("nan")
    sample[1, 0, 0, 0] = float("inf")
    assert module(sample, timestep)["sample"].isnan().any(dim=(1, 2, 3)).all()


def test_calls_work_in_inference_mode(pair: tuple[Block, ParallelModule]) -> None:
    model, module = pair
    with torch.inference_mode():
        assert same_as_lockstep(model, module, rows=18)
    assert same_as_lockstep(model, module, rows=18)  # the same program outside


def test_no_file_is_left_in_shared_memory(pair: tuple[Block, ParallelModule]) -> None:
    pair[1](*inputs())
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("torch")]


def test_dropping_the_module_ends_the_workers() -> None:
    module = parallel(block(), SpawnExecutor(2, timeout=60))
    module(*inputs())
    children = pids(module)
    del module
    gc.collect()
    assert gone(children)


def test_a_worker_that_raises_ends_the_call_with_its_traceback() -> None:
    model = block()
    engine = Engine(model, lambda program: broken_on_rank_1(cut_plan(program, 2)), SpawnExecutor(2, timeout=60))
    module = ParallelModule(model, engine)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*invalid for input.*in fxpass rank 1, at reshape"):
        module(*inputs())
    assert time.monotonic() - start < 30
    assert gone(pids(module), 0.1)
    with pytest.raises(RuntimeError, match="parallelize again"):
        module(*inputs())


def test_a_worker_that_is_killed_or_hangs_ends_the_call() -> None:
    model = block()
    cases = (
        (60, True, "killed by SIGKILL"),
        (1.5, False, "waited 1.5 s for exchange"),
        (600, False, "process is stopped"),
    )
    for timeout, kill, words in cases:
        module = parallel(model, SpawnExecutor(2, timeout=timeout))
        module(*inputs())
        (child,) = pids(module)
        os.kill(child, signal.SIGSTOP)
        if kill:
            threading.Timer(0.5, os.kill, (child, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(RankError, match=words):
            module(*inputs())
        assert time.monotonic() - began < 10
        assert gone([child], 0.1)


def test_a_worker_that_is_stopped_after_its_last_exchange_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = SpawnExecutor(2, timeout=600)
    module = parallel(block(), executor)
    module(*inputs())
    (child,) = executor.processes
    answers = executor.workers.answers

    def give_up() -> None:
        raise ConnectionError("it was stopped in the middle of its answer")

    def wait_for_stopped(seconds: float) -> None:
        os.kill(child.pid, signal.SIGSTOP)
        if executor.workers.connections[0].ready(1.0):  # its answer was sent before it was stopped: none comes after it
            with suppress(ConnectionError):
                executor.workers.connections[0].receive(give_up)
        answers(seconds)

    monkeypatch.setattr(executor.workers, "answers", wait_for_stopped)
    began = time.monotonic()
    with pytest.raises(RankError, match="process is stopped"):
        module(*inputs())
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("timeout", "words"), [(600, "process is stopped"), (1.5, "no answer within 1.5 s")], ids=["noticed", "unnoticed"]
)
def test_a_worker_that_is_stopped_in_the_middle_of_its_answer_ends_the_call(
    timeout: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = SpawnExecutor(2, timeout=timeout)
    module = parallel(block(), executor)
    module(*inputs())
    (child,) = executor.processes
    (connection,) = executor.workers.connections
    answers = executor.workers.answers
    ours, theirs = socket.socketpair()

    def begun(seconds: float) -> None:
        os.kill(child.pid, signal.SIGSTOP)
        theirs.sendall(struct.pack("<QQ", 30, 0) + b"the begin")
        executor.workers.connections[:] = [Connection(ours)]
        answers(seconds)

    monkeypatch.setattr(executor.workers, "answers", begun)
    began = time.monotonic()
    with pytest.raises(RankError, match=words):
        module(*inputs())
    assert time.monotonic() - began < 12
    connection.close()
    theirs.close()


def test_a_worker_that_takes_no_message_ends_the_call() -> None:
    executor = SpawnExecutor(2, timeout=600)
    module = parallel(block(), executor)
    module(*inputs())
    (child,) = executor.processes
    os.kill(child.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RankError, match="process is stopped"), executor.workers.ending("in a test"):
        executor.workers.send(("forget", bytes(10 << 20)))
    assert time.monotonic() - began < 12
    assert gone([child.pid], 0.1)


def test_a_worker_that_is_lost_while_something_is_released_is_named_at_the_next_call() -> None:
    executor = SpawnExecutor(2, timeout=600)
    module = parallel(block(), executor)
    module(*inputs())
    (child,) = executor.processes
    os.kill(child.pid, signal.SIGSTOP)
    executor.forget(range(2_000_000))
    assert gone([child.pid], 0.1)
    with pytest.raises(RuntimeError, match="as something was released: rank 1 failed: its process is stopped"):
        module(*inputs())
    module.close()


def test_closing_without_a_worker_that_is_lost_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = SpawnExecutor(3, timeout=600)
    module = parallel(block(), executor)
    module(*inputs())
    first, second = executor.processes

    def send(message: Any) -> None:
        if message[0] == "drop":
            raise RankError(1, "it is stopped", hangs=True)

    monkeypatch.setattr(executor.workers, "send", send)
    os.kill(first.pid, signal.SIGSTOP)
    module.close()
    assert gone([first.pid, second.pid], 0.1)


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_files_in_shared_memory_are_closed() -> None:
    descriptors: list[int] = []
    for _ in range(2):
        with parallel(block(), SpawnExecutor(2, timeout=60)) as module:
            module(*inputs())
        gc.collect()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[0] == descriptors[1]


def test_a_worker_that_ends_before_its_first_exchange_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = SpawnExecutor(2, timeout=600)
    module = parallel(block(), executor)
    module(*inputs())
    (child,) = executor.processes
    answers = executor.workers.answers

    def stopped_after_loading(seconds: float) -> None:
        answers(seconds)
        os.kill(child.pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (child.pid, signal.SIGKILL)).start()

    monkeypatch.setattr(executor.workers, "answers", stopped_after_loading)
    start = time.monotonic()
    with pytest.raises(RankError, match="was killed by SIGKILL"):
        module(*inputs(18))
    assert time.monotonic() - start < 100


def test_a_worker_that_ends_while_the_ranks_connect_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = SpawnExecutor(2, timeout=600)
    module = parallel(block(), executor)
    answers = executor.workers.answers

    def ended_after_starting(seconds: float) -> None:
        answers(seconds)
        executor.processes[0].kill()

    monkeypatch.setattr(executor.workers, "answers", ended_after_starting)
    start = time.monotonic()
    with pytest.raises(RankError, match="was killed by SIGKILL"):
        module(*inputs())
    assert time.monotonic() - start < 100


SCRIPT = """
import os, signal, sys, torch
from tests.runtime.plans import block, inputs, parallel
from fxpass.runtime.spawn import SpawnExecutor
module = parallel(block(), SpawnExecutor(2, timeout=60))
module(*inputs())
print([p.pid for p in module._engine.executor.processes][0], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_workers_end_with_this_process(how: str) -> None:
    # no `if __name__ == "__main__"` guard: the script is never imported by the workers
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, how],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == (0 if how == "ends" else -signal.SIGKILL), result.stderr
    assert gone([int(result.stdout)])
