"""The executor of a plain Python process: it is rank 0 and drives worker processes on the same machine.

    this process                                   worker (rank k)
    weights: moved to shared memory, in place ───▶ the same memory
    plan: rank k's program, constants ───────────▶ loaded once per signature
    call: inputs copied to shared memory, "run" ─▶ runs its program
          exchanges  ◀─────── shared memory ─────▶
          outputs (rank 0's)        "done" ◀──────

The user's model is never pickled and `__main__` is never imported again. Shared memory comes from /dev/shm (in a
container see `--shm-size`). Each process computes with `max(1, cores // world_size)` threads, but not more than
`torch.get_num_threads()`; if OMP_NUM_THREADS is set, with `torch.get_num_threads()`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed import PrefixStore, TCPStore

from ..ir.step import Mode, Step
from ..passes.lower_comm import StepPrograms
from .board import GRACE, POLL, Board
from .errors import RankError
from .executor import Compile, PlanLike, Question, Report, compilers, on_host
from .local import HOST, connect
from .memory import check_shm
from .network import Network
from .operators import refuse_script
from .processes import is_stopped
from .step_runner import LoadedPlan, StepRunner, coder, placeholders
from .wire import Connection, raise_file_limit

CPU = torch.device("cpu")
START = 300.0  #: seconds allowed for starting a worker or loading a plan, which import torch and users' modules


class SpawnExecutor:
    """Drives `world_size - 1` worker processes, which start at the first call.

    They end when `close()` is called, or when this object or this process ends.

    Args:
        timeout: seconds that a rank waits for another.
    """

    def __init__(self, world_size: int, *, timeout: float = 600.0, compile: Compile = False) -> None:  # noqa: A002
        self.world_size = world_size
        self.timeout = timeout
        self.compile = compile
        self.inductor, _ = compilers(compile, CPU)
        self.threads = _threads(world_size)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._network: Network | None = None
        self.traffic: Counter[str] = Counter()
        self._store: TCPStore | None = None
        self._sent: dict[str, Tensor] = {}  # weights that the workers have; kept alive so that no address is reused
        self._plans: dict[int, SpawnPlan] = {}
        self._numbers = 0
        self._calls = 0
        self.ended: str | None = None  #: why the workers have ended, if they have
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self.processes, self._connections)

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> SpawnPlan:
        """Send every worker its program.

        Raises:
            NotImplementedError: the model is not on the CPU, or an operator is registered by the script itself.
            OSError: too little shared memory, or too low a limit of open files.
            RankError: a worker did not start, or could not load its program.
        """
        for tensor in (*weights, *inputs):
            if tensor.device.type != "cpu":
                raise NotImplementedError(
                    f"executor='spawn' runs models on the CPU, this one is on {tensor.device}; start the script with "
                    f"`torchrun --nproc-per-node {self.world_size} …` (executor='distributed')"
                )
        refuse_script({node.target for node in plan.graph.nodes if isinstance(node.target, OpOverload)})
        network = self._started()
        with self._ending("in an earlier call"):
            return self._load(plan, network, weights, inputs)

    def _load(self, plan: PlanLike, network: Network, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> SpawnPlan:
        names = list(plan.program.weights.values())
        self._share(names, weights)
        self._numbers += 1
        constants = list(plan.program.constants.values())
        size = sum(tensor.nbytes for tensor in (*constants, *inputs))
        check_shm(size, "sharing this call's inputs and the model's constants")
        with torch.inference_mode(False):  # later calls write to them, also outside inference mode
            shared = [torch.empty_like(tensor) for tensor in inputs]
        for rank, connection in enumerate(self._connections, 1):
            steps = StepPrograms(plan.graph, rank)
            loaded = LoadedPlan(
                placeholders(plan.program), names, constants, shared, steps.channels, steps.state, self.inductor
            )
            connection.send(("load", self._numbers, loaded))
        self._answers(START)
        runner = StepRunner.of(
            plan, 0, lambda specs: network.open(specs, CPU), CPU, self.traffic, compile=self.inductor
        )
        self._plans[self._numbers] = found = SpawnPlan(self, self._numbers, plan, runner, shared)
        return found

    def begin(self, device: torch.device) -> None:
        if self.ended:
            raise RuntimeError(f"the worker processes have ended ({self.ended}); call fxpass.parallelize again")

    def failed(self, error: BaseException) -> None:
        pass  # workers take no part before the run, and `run` ends them if it fails

    def close(self) -> None:
        """End the workers and wait for their processes to end."""
        self.ended = self.ended or "they were closed"
        self._finalizer()
        self._plans.clear()
        self._sent.clear()
        self._network = self._store = None

    def run(self, plan: SpawnPlan, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """Rank 0's outputs, once all ranks are done. If a rank fails, all workers end.

        Raises:
            RankError: with the worker's own traceback.
        """
        with self._ending("in an earlier call"):
            self._share(plan.names, weights)
            for buffer, tensor in zip(plan.shared, inputs, strict=True):
                buffer.copy_(tensor)
            self._calls += 1
            assert self._network is not None
            self._network.board.call = self._calls
            mode = plan.runner.mode(step)
            self._send_code(plan, mode)
            for connection in self._connections:
                connection.send(("run", plan.number, self._calls, step.context, mode, step.pace))
            with _computing_with(self.threads):
                outputs = plan.runner.run(weights, inputs, step.context, mode, step.pace)
            self._answers(self.timeout)
        return outputs

    def _send_code(self, plan: SpawnPlan, mode: Mode) -> None:
        """Send the workers the code of a mode, if they do not have it."""
        if mode in plan.sent:
            return
        for rank, connection in enumerate(self._connections, 1):
            code = coder(StepPrograms(plan.plan.graph, rank), compile=self.inductor)(mode)
            connection.send(("code", plan.number, mode, code))
        self._answers(START)
        plan.sent.add(mode)

    def release(self, plan: SpawnPlan) -> None:
        """Remove a plan from the workers, and the weights that no other plan uses."""
        if self._plans.pop(plan.number, None) is None:
            return
        needed = {name for other in self._plans.values() for name in other.names}
        unused = [name for name in dict.fromkeys(plan.names) if name not in needed and name in self._sent]
        for name in unused:
            del self._sent[name]
        try:
            for connection in self._connections:
                connection.send(("release", plan.number, unused))
            plan.runner.close()
        except (ConnectionError, RankError):  # the next call raises, with the reason
            return

    def _started(self) -> Network:
        if self._network is not None:
            return self._network
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self.timeout))
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        for rank in range(1, self.world_size):
            ours, theirs = socket.socketpair()
            arguments = (theirs.fileno(), rank, self.world_size, self._store.port, self.timeout, self.threads)
            command = [sys.executable, "-P", "-m", "fxpass.runtime.worker", *map(str, arguments)]
            with theirs:
                self.processes.append(
                    subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
                )
            self._connections.append(Connection(ours))
        with self._ending("at their start"):
            self._answers(START)
            board = Board(PrefixStore("board", self._store), 0, self.world_size, self.timeout)
            board.check_more = self._look
            self._network = connect(self._store, board)
        return self._network

    def _share(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Send the weights that the workers do not have: first all, later those whose memory or layout changed."""
        sent = self._sent
        new = {
            name: weight.detach()
            for name, weight in zip(names, weights, strict=True)
            if name not in sent or _place(sent[name]) != _place(weight)
        }
        if not new or not self._connections:
            return
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in new.values()}
        size = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
        check_shm(size, "sharing this model's weights")
        raise_file_limit(len(storages))
        for connection in self._connections:
            connection.send(("weights", new))
        sent.update(new)

    def _answers(self, seconds: float) -> None:
        """Wait for every worker to say that it is ready or done.

        Raises:
            RankError: a worker failed, or did not answer in time.
            ConnectionError: one has ended.
        """
        waiting = dict(zip(self._connections, range(1, self.world_size), strict=True))
        deadline = time.monotonic() + seconds
        while waiting:
            ready = select.select(list(waiting), [], [], POLL)[0]
            if not ready and self._network:
                self._network.board.check()
            for connection in ready:
                rank = waiting.pop(connection)
                message = connection.receive()
                if message[0] == "error":
                    raise RankError(rank, message[2])
            if waiting and time.monotonic() > deadline:
                raise RankError(min(waiting.values()), f"no answer within {seconds:g} s")

    def _look(self) -> None:
        """Raises `RankError` if a worker process has ended."""
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is not None:
                raise RankError(rank, f"its process ({process.pid}) has ended")

    @contextmanager
    def _ending(self, when: str) -> Iterator[None]:
        """End the workers if the body raises, and raise the first cause of the failure."""
        try:
            yield
        except BaseException as error:
            cause = self._cause(error) if isinstance(error, RankError | ConnectionError) else error
            self.ended = f"{when}: {str(cause).partition(chr(10))[0] or type(cause).__name__}"  # Ctrl-C has no text
            self.close()
            if cause is error:
                raise
            raise cause from None

    def _cause(self, error: Exception) -> Exception:
        """The first failure: an exception of a worker's own, else a worker that ended, else `error`."""
        followers: list[RankError] = []
        deadline = time.monotonic() + GRACE
        for rank, (connection, process) in enumerate(zip(self._connections, self.processes, strict=True), 1):
            try:
                while connection.ready(max(0.0, deadline - time.monotonic())):
                    message = connection.receive()
                    if message[0] == "error" and not message[1]:
                        return RankError(rank, message[2])
                    if message[0] == "error":
                        followers.append(RankError(rank, message[2]))
            except ConnectionError:
                process.wait(GRACE)
        for rank, process in enumerate(self.processes, 1):
            code = process.poll()
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return RankError(rank, f"its process ({process.pid}) {how}")
        if isinstance(error, RankError):
            return error
        return followers[0] if followers else RankError(None, f"lost the connection to a worker ({error})")


class SpawnPlan:
    """A plan loaded on all ranks."""

    def __init__(
        self, executor: SpawnExecutor, number: int, plan: PlanLike, runner: StepRunner, shared: list[Tensor]
    ) -> None:
        self.executor = executor
        self.number = number
        self.plan = plan
        self.runner = runner
        self.names = list(plan.program.weights.values())
        self.shared = shared  #: shared buffers for the inputs of a call
        self.sent: set[Mode] = set()  #: modes whose code the workers have

    def decide(self, inputs: Sequence[Tensor], question: Question) -> Step:
        return question.decide(on_host(question.facts))

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        return self.executor.run(self, weights, inputs, step)

    @property
    def compiled(self) -> Sequence[Report]:
        return self.runner.reports

    def release(self) -> None:
        self.executor.release(self)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The address and layout of a tensor: equal for two views of the same elements."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _threads(world: int) -> int:
    """The number of threads of each process."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return min(torch.get_num_threads(), max(1, len(os.sched_getaffinity(0)) // world))


@contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stop(creator: int, processes: list[subprocess.Popen[bytes]], connections: list[Connection]) -> None:
    """End the workers by closing their connections."""
    if os.getpid() != creator:
        return  # in a forked child, whose workers these are not
    for connection in connections:
        connection.close()
    for process in processes:
        if is_stopped(process.pid):
            process.kill()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
