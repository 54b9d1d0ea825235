"""Processes that compile: how they start and end, and what is left to the caller."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest

from fxpass.ir.code import Segment
from fxpass.runtime import precompile
from fxpass.runtime.spawn import SpawnExecutor
from fxpass.runtime.wire import Connection
from tests.runtime.plans import block, inputs, parallel

JOB: precompile.Job = (Segment("def segment(inputs):\n    return ()\n", ()), ())


def answering(count: int, pause: float) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process, and a connection on which a thread answers `count` times, then hangs up."""
    ours, theirs = socket.socketpair()
    there = Connection(theirs)

    def run() -> None:
        try:
            for _ in range(count):
                there.send(("", True))
                there.packet()
                time.sleep(pause)
        except ConnectionError:
            pass
        there.close()

    threading.Thread(target=run, daemon=True).start()
    return subprocess.Popen(["sleep", "60"]), Connection(ours)


def test_a_process_that_cannot_start_leaves_the_segments_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    precompile.compile_in_processes([JOB], 2)


def test_a_segment_whose_process_ends_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_start", lambda _: answering(1, 0))
    assert not precompile.compile_in_processes([JOB], 1)


def test_file_descriptors_above_1023_can_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
    kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        monkeypatch.setattr(precompile, "_start", lambda _: answering(2, 0))
        assert precompile.compile_in_processes([JOB], 1)
    finally:
        for each in kept:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_time_is_bounded_though_processes_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_start", lambda _: answering(1000, 0.05))
    monkeypatch.setattr(precompile, "PATIENCE", 0.5)
    began = time.monotonic()
    precompile.compile_in_processes([JOB] * 200, 1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("bytes_", [5, 16], ids=["half a header", "a header"])
def test_a_process_that_falls_silent_in_the_middle_of_an_answer_is_left(
    bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall((b"\x28" + bytes(15))[:bytes_])
        monkeypatch.setattr(precompile, "_start", lambda _: (subprocess.Popen(["sleep", "60"]), Connection(ours)))
        monkeypatch.setattr(precompile, "PATIENCE", 0.5)
        began = time.monotonic()
        precompile.compile_in_processes([JOB], 1)
        assert time.monotonic() - began < 5


def test_ctrl_c_does_not_reach_a_process_that_compiles() -> None:
    process, connection = precompile._start(dict(os.environ))
    try:
        assert os.getpgid(process.pid) != os.getpgrp()
    finally:
        connection.close()
        process.kill()
        process.wait()


def test_a_process_that_compiles_ends_with_its_parent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "fxpass.runtime.precompile", str(theirs.fileno()), "1"]  # not its parent
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
            try:
                assert process.wait(60) == 0
            finally:
                process.kill()


class StopError(Exception):
    pass


def test_the_first_rank_shares_the_cores_with_the_workers_that_it_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []

    def noted(sharing: int) -> int:
        shared.append(sharing)
        raise StopError

    monkeypatch.setattr(precompile, "most_processes", noted)
    module = parallel(block(), SpawnExecutor(2, timeout=60, compile=True))
    with pytest.raises(StopError):
        module(*inputs())
    assert shared == [2]


def test_ranks_that_share_a_machine_start_fewer_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert [precompile.most_processes(sharing) for sharing in (1, 2, 4, 8)] == [12, 6, 3, 0]
