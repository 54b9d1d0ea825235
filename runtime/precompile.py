"""Compile the segments of a step in several processes, before the step first runs.

Inductor compiles one graph at a time in a process, mostly in Python. Here each process compiles some of the segments
and leaves the results in Inductor's cache on disk. What a process cannot compile is left to the caller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
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
from .wire import Connection

log = logging.getLogger("fxpass")
Job = tuple[Segment, tuple[Form, ...]]
MOST = 12  #: processes; each holds some hundred MB, on GPUs too
PATIENCE = 600.0  #: seconds without an answer of any process, after which this process compiles the rest
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


def most_processes() -> int:
    """How many processes may compile at once; 0 where this process alone is as fast."""
    most = min(MOST, _cores() * 3 // 4)
    return most if most > 1 else 0


def _cores() -> int:
    """Those that a rank has for itself."""
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def compile_in_processes(wanted: Sequence[Job], count: int) -> bool:
    """Compile segments in `count` new processes. Returns whether Inductor's cache had all of them."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, _cores() // count)),  # for the kernels of one segment
    }
    waiting = sorted(wanted, key=lambda job: len(job[0].source))  # the longest are compiled first
    working: list[Connection] = []
    started: list[subprocess.Popen[bytes]] = []
    cached = True
    try:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-P", "-m", "fxpass.runtime.precompile", str(theirs.fileno())]
            with theirs:
                descriptors = [theirs.fileno()]
                started.append(
                    subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment)
                )
            working.append(Connection(ours))
        while working:
            ready = select.select(working, [], [], PATIENCE)[0]
            if not ready:
                log.debug("no process that compiles has answered for %g s", PATIENCE)
                break
            for connection in ready:
                try:
                    error, hit = connection.receive()
                    if error:
                        log.debug("a segment is left to this process: %s", error)
                    cached = cached and hit
                    if _sent(waiting, connection):
                        continue
                except ConnectionError as problem:
                    log.debug("a process that compiles has ended: %s", problem)
                working.remove(connection)
                connection.close()
    finally:
        for connection in working:
            connection.close()
        for process in started:
            process.kill()
            process.wait()
    return cached


def _sent(waiting: list[Job], connection: Connection) -> bool:
    """Send a process one of the segments that wait, unless there is none. Raises `ConnectionError` if it has ended."""
    while waiting:
        job = waiting.pop()
        try:
            connection.send(("compile", *job, _settings()))
        except ConnectionError:
            raise
        except Exception as error:  # pickles fail in many ways
            log.debug("a segment is left to this process: %s", error)
        else:
            return True
    return False


def _settings() -> dict[str, Any]:
    """What Inductor's cache compares beside the graph: attributes of `torch.backends.cuda.matmul`."""
    names = "fp32_precision", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    return {name: getattr(torch.backends.cuda.matmul, name) for name in names}


def main(descriptor: int) -> None:
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
            for name, value in settings.items():
                if value != _settings()[name]:
                    setattr(torch.backends.cuda.matmul, name, value)
            compiled_segment(segment, forms)
            answer = "", missed() == before
        except Exception as error:
            answer = f"{type(error).__name__}: {error}", False


if __name__ == "__main__":
    main(int(sys.argv[1]))
