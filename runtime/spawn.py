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

import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..ir.step import Mode, Step
from ..passes.lower_comm import StepPrograms
from .errors import RankError
from .executor import Compile, PlanLike, Question, Report, compilers, on_host
from .memory import check_shm
from .network import Network
from .operators import refuse_script
from .step_runner import LoadedPlan, StepRunner, coder, placeholders
from .wire import raise_file_limit
from .workers import START, Workers

CPU = torch.device("cpu")


class SpawnExecutor:
    """Drives `world_size - 1` worker processes, which start at the first call.

    They end when all executors that share them are closed, when a call fails, or when they or this process end.

    Args:
        timeout: seconds that a rank waits for another.
        workers: those of another executor; default: its own.
    """

    def __init__(
        self,
        world_size: int,
        *,
        timeout: float = 600.0,
        compile: Compile = False,  # noqa: A002
        workers: Workers | None = None,
    ) -> None:
        self.world_size = world_size
        self.compile = compile
        self.workers = workers or Workers(world_size, timeout)
        self.workers.join(self)
        self._scope = f"{self.workers.number()}/"  # of the names of its weights
        self._closed = False
        self.inductor, _ = compilers(compile, CPU)
        self.traffic: Counter[str] = Counter()
        self._sent: dict[str, Tensor] = {}  # weights that the workers have; kept alive so that no address is reused
        self._plans: dict[int, SpawnPlan] = {}

    def share(self) -> SpawnExecutor:
        """Another executor on the same workers."""
        workers = self.workers
        return SpawnExecutor(self.world_size, timeout=workers.timeout, compile=self.compile, workers=workers)

    @property
    def ended(self) -> str | None:
        """Why the workers have ended, if they have."""
        return self.workers.ended or ("they were closed" if self._closed else None)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The worker processes."""
        return self.workers.processes

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
        network = self.workers.started()
        with self.workers.ending("in an earlier call"):
            return self._load(plan, network, weights, inputs)

    def _load(self, plan: PlanLike, network: Network, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> SpawnPlan:
        names = list(plan.program.weights.values())
        self._share(names, weights)
        number = self.workers.number()
        constants = list(plan.program.constants.values())
        size = sum(tensor.nbytes for tensor in (*constants, *inputs))
        check_shm(size, "sharing this call's inputs and the model's constants")
        with torch.inference_mode(False):  # later calls write to them, also outside inference mode
            shared = [torch.empty_like(tensor) for tensor in inputs]
        for rank, connection in enumerate(self.workers.connections, 1):
            steps = StepPrograms(plan.graph, rank)
            loaded = LoadedPlan(
                placeholders(plan.program),
                self._scoped(names),
                constants,
                shared,
                steps.channels,
                steps.state,
                self.inductor,
            )
            connection.send(("load", number, loaded))
        self.workers.answers(START)
        runner = StepRunner.of(
            plan, 0, lambda specs: network.open(specs, CPU), CPU, self.traffic, compile=self.inductor
        )
        self._plans[number] = found = SpawnPlan(self, number, plan, runner, shared)
        return found

    def begin(self, device: torch.device) -> None:
        if self.ended:
            raise RuntimeError(f"the worker processes have ended ({self.ended}); call fxpass.parallelize again")

    def failed(self, error: BaseException) -> None:
        pass  # workers take no part before the run, and `run` ends them if it fails

    def close(self) -> None:
        """Leave the workers. They end when no other executor uses them."""
        for plan in list(self._plans.values()):
            self.release(plan)
        self._sent.clear()
        if not self._closed:
            self._closed = True
            self.workers.leave(self)

    def run(self, plan: SpawnPlan, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """Rank 0's outputs, once all ranks are done. If a rank fails, all workers end.

        Raises:
            RankError: with the worker's own traceback.
        """
        with self.workers.ending("in an earlier call"):
            self._share(plan.names, weights)
            for buffer, tensor in zip(plan.shared, inputs, strict=True):
                buffer.copy_(tensor)
            self.workers.calls += 1
            assert self.workers.network is not None
            self.workers.network.board.call = self.workers.calls
            mode = plan.runner.mode(step)
            self._send_code(plan, mode)
            self.workers.send(("run", plan.number, self.workers.calls, step.context, mode, step.pace))
            with _computing_with(self.workers.threads):
                outputs = plan.runner.run(weights, inputs, step.context, mode, step.pace)
            self.workers.answers(self.workers.timeout)
        return outputs

    def _send_code(self, plan: SpawnPlan, mode: Mode) -> None:
        """Send the workers the code of a mode, if they do not have it."""
        if mode in plan.sent:
            return
        for rank, connection in enumerate(self.workers.connections, 1):
            code = coder(StepPrograms(plan.plan.graph, rank), compile=self.inductor)(mode)
            connection.send(("code", plan.number, mode, code))
        self.workers.answers(START)
        plan.sent.add(mode)

    def _scoped(self, names: Sequence[str]) -> list[str]:
        """Names of weights, as the workers know them."""
        return [self._scope + name for name in names]

    def release(self, plan: SpawnPlan) -> None:
        """Remove a plan from the workers, and the weights that no other plan uses."""
        if self._plans.pop(plan.number, None) is None or self.workers.ended:
            return
        needed = {name for other in self._plans.values() for name in other.names}
        unused = [name for name in dict.fromkeys(plan.names) if name not in needed and name in self._sent]
        for name in unused:
            del self._sent[name]
        try:
            self.workers.send(("release", plan.number, self._scoped(unused)))
            plan.runner.close()
        except (ConnectionError, RankError):  # the next call raises, with the reason
            return

    def _share(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Send the weights that the workers do not have: first all, later those whose memory or layout changed."""
        sent = self._sent
        new = {
            name: weight.detach()
            for name, weight in zip(names, weights, strict=True)
            if name not in sent or _place(sent[name]) != _place(weight)
        }
        if not new or not self.workers.connections:
            return
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in new.values()}
        size = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
        check_shm(size, "sharing this model's weights")
        raise_file_limit(len(storages))
        self.workers.send(("weights", dict(zip(self._scoped(list(new)), new.values(), strict=True))))
        sent.update(new)


class SpawnPlan:
    """A plan loaded on all ranks."""

    def __init__(
        self,
        executor: SpawnExecutor,
        number: int,
        plan: PlanLike,
        runner: StepRunner,
        shared: list[Tensor],
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
