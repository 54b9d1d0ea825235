"""Compile the segments of a step in several processes, before the step first runs.

Inductor compiles one graph at a time in a process, mostly in Python. Here each process compiles some of the segments
and leaves the results in Inductor's cache on disk. What a process cannot compile is left to the caller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..ir import comm
from ..ir.code import Form, Segment, StepCode
from ..ir.ops import Table, index_tensors_from
from ..ir.step import ChannelSpec
from .numerics import apply, numerics
from .wire import Connection, Watch

log = logging.getLogger("fxpass")
Job = tuple[Segment, tuple[Form, ...]]
MOST = 12  #: processes; each holds some hundred MB, on GPUs too
PATIENCE = 120.0  #: seconds in all, after which this process compiles the rest
SHARE = 2  #: segments, for which it is worth to start a process


def jobs(code: StepCode, values: Sequence[Tensor], specs: Sequence[ChannelSpec]) -> list[Job]:
    """The distinct segments of a step and the forms of their inputs, found by a run on tensors without data.

    Args:
        values: of the code's placeholders.
        specs: the channels.
    """
    found: dict[Job, Any] = {}  #: to the results: forms in place of tensors
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))

    def recorder(segment: Segment) -> Callable[[list[Tensor]], Any]:
        def run(inputs: list[Tensor]) -> Any:
            job = segment, tuple([Form.of(x) for x in inputs])
            if job not in found:
                results = segment.function()(inputs)
                found[job] = pytree.tree_map_only(Tensor, Form.of, list(results))
            inputs.clear()
            return pytree.tree_map_only(Form, Form.empty, found[job], is_leaf=lambda x: isinstance(x, Form))

        return run

    def table(index: Table, there: torch.device) -> Tensor:
        return torch.empty(
            index.array.shape, dtype=torch.from_numpy(np.empty(0, index.array.dtype)).dtype, device=there
        )

    with mode, torch.no_grad(), index_tensors_from(table):
        compiled = {name: recorder(each) for name, each in code.segments.items()}
        run = code.run([Form.of(value).empty() for value in values], compiled)
        received: list[Tensor] | None = None
        with contextlib.suppress(StopIteration):
            while True:
                act, channel, _ = run.send(received)
                received = None
                if act == "get":
                    spec = specs[channel]
                    place = spec.place(code.rank)
                    received = [comm.new_received(each, place, device) for each in spec.exchanges]
    return list(found)


def most_processes(sharing: int = 1) -> int:
    """How many processes may compile at once; 0 where this process alone is as fast.

    Args:
        sharing: the processes that share this machine's cores, of which each does so.
    """
    most = min(MOST, _cores(sharing) * 3 // 4)
    return most if most > 1 else 0


def _cores(sharing: int) -> int:
    """Those that a process has for itself."""
    return len(os.sched_getaffinity(0)) // sharing


def compile_in_processes(wanted: Sequence[Job], count: int, sharing: int = 1) -> bool:
    """Compile segments in `count` new processes. Returns whether Inductor's cache had all of them."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, _cores(sharing) // count)),  # for the kernels of one segment
    }
    waiting = sorted(wanted, key=lambda job: len(job[0].source))  # the longest are compiled first
    busy: set[Connection] = set()
    started: list[tuple[subprocess.Popen[bytes], Connection]] = []
    cached = True
    deadline = time.monotonic() + PATIENCE

    def watch() -> None:
        if time.monotonic() > deadline:
            raise ConnectionError(f"it was silent in the middle of a message until {PATIENCE:g} s had passed")

    with selectors.DefaultSelector() as working:
        try:
            for _ in range(count):
                try:
                    started.append(_start(environment))
                except OSError as error:
                    log.debug("a process that compiles could not start: %s", error)
                    break
                working.register(started[-1][1], selectors.EVENT_READ)
            while working.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    log.debug("segments are not compiled after %g s and left to this process", PATIENCE)
                    break
                for key, _ in working.select(left):
                    connection: Any = key.fileobj
                    try:
                        error, hit = connection.receive(watch)
                        busy.discard(connection)
                        if error:
                            log.debug("a segment is left to this process: %s", error)
                        cached = cached and hit
                        if _sent(waiting, connection, watch):
                            busy.add(connection)
                            continue
                    except ConnectionError as problem:
                        log.debug("a process that compiles has ended: %s", problem)
                    working.unregister(connection)
        finally:
            for process, connection in started:
                connection.close()
                process.kill()
                process.wait()
    return cached and not busy


def _start(environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a process that compiles. Ctrl-C does not reach its process group. Raises `OSError`."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptor = theirs.fileno()
        command = [sys.executable, "-P", "-m", "fxpass.runtime.precompile", str(descriptor), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=environment, process_group=0
            )
        except OSError:
            ours.close()
            raise
    return process, Connection(ours)


def _sent(waiting: list[Job], connection: Connection, watch: Watch) -> bool:
    """Send a process one of the segments that wait, unless there is none. Raises `ConnectionError` if it has ended."""
    while waiting:
        job = waiting.pop()
        try:
            connection.send(("compile", *job, _settings()), watch)
        except ConnectionError:
            raise
        except Exception as error:  # pickles fail in many ways
            log.debug("a segment is left to this process: %s", error)
        else:
            return True
    return False


def _settings() -> dict[str, Any]:
    """What Inductor's cache compares beside the graph."""
    return {
        "numerics": numerics(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def _apply(settings: dict[str, Any]) -> None:
    """Compile as the caller does."""
    apply(settings["numerics"])
    torch.set_default_dtype(settings["dtype"])
    torch.set_num_threads(settings["threads"])


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main(descriptor: int, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from .segments import compiled_segment, missed

    connection = Connection(socket.socket(fileno=descriptor))
    answer: tuple[str, bool] = ("", True)
    while True:
        try:
            connection.send(answer)
            load = connection.packet()
        except ConnectionError:
            return
        before = missed()
        try:
            _, segment, forms, settings = load()
            _apply(settings)
            compiled_segment(segment, forms)
            answer = "", missed() == before
        except Exception as error:
            answer = f"{type(error).__name__}: {error}", False
        finally:
            torch.set_num_threads(1)  # those of the caller count for the compiled code only


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
