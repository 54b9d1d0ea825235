"""Worker processes on this machine, which this process drives: started together, and ended together."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, is_nccl_available

from .board import GRACE, POLL, Board
from .errors import RankError
from .groups import HOST, connect
from .network import OVERLAP, Network
from .numerics import numerics
from .processes import is_stopped
from .wire import Connection

START = 300.0  #: seconds allowed for starting a worker or loading a plan, which import torch and users' modules


class Workers:
    """`world_size - 1` processes, which start when they are first needed. Several executors can share them.

    They end when the last executor has left, when a call fails, or when this object or this process ends.

    Args:
        timeout: seconds that a rank waits for another.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self.threads = _threads(world_size)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.network: Network | None = None
        self.ended: str | None = None  #: why they have ended, if they have
        self.calls = 0
        self.devices: list[torch.device] = []  #: of each rank, once they have started
        self.buffer: Tensor | None = None  #: host memory that they share, through which copies of weights travel
        self._numerics: dict[str, Any] = {}  #: those that they have
        self._groups: list[Any] = []  #: process groups to be aborted at the end
        self._store: TCPStore | None = None
        self._numbers = 0
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self.processes, self.connections, self._groups)

    def number(self) -> int:
        """Another number at each call."""
        self._numbers += 1
        return self._numbers

    def join(self, executor: Any) -> None:
        """An executor begins to use them."""
        self._users.add(executor)

    def leave(self, executor: Any) -> None:
        """An executor uses them no more."""
        self._users.discard(executor)
        if not self._users:
            self.stop("they were closed")

    def stop(self, why: str) -> None:
        """End the workers and wait for their processes to end."""
        self.ended = self.ended or why
        if self.network is not None:
            self.network.abort(RuntimeError(why))  # a device must not wait for workers that are no more
            self._groups.clear()
        self._finalizer()
        self.network = self._store = self.buffer = None

    def send(self, message: Any) -> None:
        """Send all workers a message.

        Raises:
            RankError: one does not take it.
            ConnectionError: one has ended.
        """
        for rank in range(1, len(self.connections) + 1):
            self.send_to(rank, message)

    def send_to(self, rank: int, message: Any) -> None:
        """Send one worker a message."""
        watch = self._watch(rank, f"did not take a message within {self.timeout:g} s", self.timeout)
        self.connections[rank - 1].send(message, watch)

    def _watch(self, rank: int, silence: str, seconds: float) -> Callable[[], None]:
        """A function to be called while a worker is waited for; raises `RankError` if that is in vain."""
        deadline = time.monotonic() + seconds

        def watch() -> None:
            if self.network:
                self.network.board.check()
            if time.monotonic() > deadline:
                raise RankError(rank, silence, hangs=True)

        return watch

    def check(self, device: torch.device) -> None:
        """Check that they can take part in a call on `device`.

        Raises:
            NotImplementedError: it is neither the CPU nor a CUDA device.
            ValueError: there are fewer devices than ranks, or the workers run with another device.
        """
        if not self.devices:
            devices_of(device, self.world_size)
        elif device != self.devices[0]:
            raise ValueError(
                f"this call is on {device}, but the worker processes were started for a model on {self.devices[0]}; "
                f"move the model and its inputs to {self.devices[0]}, or call fxpass.parallelize again"
            )

    def share_numerics(self) -> None:
        """Let the workers compute with the precisions and kernels that this process has chosen."""
        now = numerics()
        if now != self._numerics:
            self.send(("numerics", now))
            self._numerics = now

    def started(self, device: torch.device) -> Network:
        """The connection to them; the first call starts them, for a model on `device`."""
        if self.network is not None:
            return self.network
        self.devices = devices_of(device, self.world_size)
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self.timeout))
        self._store = store
        with self.ending("at their start"):
            for rank in range(1, self.world_size):
                self._start(rank, store.port)
            self.answers(START)
            board = Board(PrefixStore("board", store), 0, self.world_size, self.timeout)
            board.check_more = self._look
            self.network = connect(board, device, nccl=is_nccl_available(), local=True)
            if not self.network.blocking:
                self._groups.append(self.network.group)
        return self.network

    def _start(self, rank: int, port: int) -> None:
        """Start the process of a rank, which finds the others at a port."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        ours, theirs = socket.socketpair()
        self.connections.append(Connection(ours))
        with theirs:
            arguments = (theirs.fileno(), rank, self.world_size, port, self.timeout, self.threads, self.devices[rank])
            command = [sys.executable, "-P", "-m", "fxpass.runtime.worker", *map(str, arguments)]
            self.processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
            )

    def answers(self, seconds: float) -> None:
        """Wait for every worker to say that it is ready or done.

        Raises:
            RankError: a worker failed, or did not answer in time.
            ConnectionError: one has ended.
        """
        silence = f"no answer within {seconds:g} s"
        with selectors.DefaultSelector() as waiting:
            for rank, connection in enumerate(self.connections, 1):
                waiting.register(connection, selectors.EVENT_READ, (rank, self._watch(rank, silence, seconds)))
            while waiting.get_map():
                ready = [key for key, _ in waiting.select(POLL)]
                if not ready:
                    _, watch = min((key.data for key in waiting.get_map().values()), key=itemgetter(0))
                    watch()
                for key in ready:
                    waiting.unregister(key.fileobj)
                    rank, watch = key.data
                    message = self.connections[rank - 1].receive(watch)
                    if message[0] == "error":
                        raise RankError(rank, message[2])

    def _look(self) -> None:
        """Raises `RankError` if a worker process has ended."""
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is not None:
                raise RankError(rank, f"its process ({process.pid}) has ended")

    @contextmanager
    def ending(self, when: str) -> Iterator[None]:
        """End the workers if the body raises, and raise the first cause of the failure."""
        try:
            yield
        except BaseException as error:
            cause = self._cause(error) if isinstance(error, RankError | ConnectionError) else error
            self.stop(f"{when}: {str(cause).partition(chr(10))[0] or type(cause).__name__}")  # Ctrl-C has no text
            if cause is error:
                raise
            raise cause from None

    def _cause(self, error: Exception) -> Exception:
        """The first failure: an exception of a worker's own, else a worker that ended, else `error`."""
        followers: list[RankError] = []
        deadline = time.monotonic() + GRACE
        for rank, (connection, process) in enumerate(zip(self.connections, self.processes, strict=True), 1):
            try:
                while connection.ready(max(0.0, deadline - time.monotonic())):
                    message = connection.receive(self._watch(rank, "its message has no end", GRACE))
                    if message[0] == "error" and not message[1]:
                        return RankError(rank, message[2])
                    if message[0] == "error":
                        followers.append(RankError(rank, message[2]))
            except RankError as silent:
                followers.append(silent)
            except ConnectionError:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        for rank, process in enumerate(self.processes, 1):
            code = process.poll()
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return RankError(rank, f"its process ({process.pid}) {how}")
        if isinstance(error, RankError):
            return error
        return followers[0] if followers else RankError(None, f"lost the connection to a worker ({error})")


def devices_of(first: torch.device, world: int) -> list[torch.device]:
    """The device of each rank: rank 0 is where the model is, the others take the other devices in order.

    Raises:
        NotImplementedError: `first` is neither the CPU nor a CUDA device.
        ValueError: there are fewer devices than ranks.
    """
    if first.type == "cpu":
        return [first] * world
    if first.type != "cuda":
        raise NotImplementedError(
            f"executor='spawn' runs models on the CPU and on CUDA devices, this one is on {first}; start the script "
            f"with `torchrun --nproc-per-node {world} …` (executor='distributed')"
        )
    count = torch.cuda.device_count()
    if count < world and os.environ.get(OVERLAP) != "1":
        raise ValueError(
            f"world_size={world} needs {world} CUDA devices, one for each rank, but this process sees {count} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'is not set')}); pass a smaller world_size"
            + f", at most {count}"
            * (count > 1)
        )
    others = [index for index in range(count) if index != first.index]
    every = [torch.device("cuda", index) for index in (first.index, *others)]
    return [every[rank % count] for rank in range(world)]


def _threads(world: int) -> int:
    """The number of threads of each process."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return min(torch.get_num_threads(), max(1, len(os.sched_getaffinity(0)) // world))


def _stop(
    creator: int, processes: list[subprocess.Popen[bytes]], connections: list[Connection], groups: list[Any]
) -> None:
    """End the workers by closing their connections."""
    if os.getpid() != creator:
        return  # in a forked child, whose workers these are not
    for connection in connections:
        connection.close()
    while groups:
        groups.pop().abort()
    for process in processes:
        if is_stopped(process.pid):
            process.kill()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
