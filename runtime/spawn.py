"""The executor of a plain Python process: it runs rank 0 and drives worker processes on the same machine.

    this process                                    worker (rank k, or several)
    CPU: weights in shared memory, in place ──────▶ the same memory
    CUDA: weights, once, then what has changed ───▶ copies on its device
    plan: rank k's program, constants ────────────▶ loaded once per signature
    call: inputs copied to shared memory, "run" ──▶ runs its program
          exchanges  ◀── shared memory, or GPUs ──▶
          outputs (rank 0's)        "done" ◀───────

On CUDA, rank 0 is on the model's device and the others take the other devices in order. The user's model is never
pickled and `__main__` is never imported again. Shared memory comes from /dev/shm (in a container see `--shm-size`).
Each process computes with `max(1, cores // world_size)` threads, but not more than `torch.get_num_threads()`; if
OMP_NUM_THREADS is set, with `torch.get_num_threads()`.
"""

from __future__ import annotations

import subprocess
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..ir.program import placeholders_on
from ..ir.step import Mode, Step
from ..passes.lower_comm import StepPrograms
from .errors import RankError
from .executor import Compile, PlanLike, Question, Report, compilers, device_of, on_host
from .held import NOTHING, Held, Holding
from .memory import check_shm
from .network import Network
from .operators import refuse_script
from .rank_steps import RankSteps, steps_of
from .step_runner import LoadedPlan, coder, placeholders
from .weights import CopiedWeights, Readers, SharedWeights, Weights
from .workers import START, Workers

GENERATIONS = 64  #: remembered of each plan, to compare weights once in each


class SpawnExecutor:
    """Drives `world_size - 1` worker processes, which start at the first call.

    They end when all executors that share them are closed, when a call fails, or when they or this process end.

    Args:
        timeout: seconds that a rank waits for another.
        workers: those of another executor; default: its own.
        copies: give each worker copies of the weights, also on the CPU (for tests).
    """

    def __init__(
        self,
        world_size: int,
        *,
        timeout: float = 600.0,
        compile: Compile = False,  # noqa: A002
        workers: Workers | None = None,
        copies: bool = False,
    ) -> None:
        self.world_size = world_size
        self.compile: Compile = compile
        self.workers = workers or Workers(world_size, timeout)
        self.workers.join(self)
        self._scope = f"{self.workers.number()}/"  # of the names of its weights
        self._closed = False
        self.traffic: Counter[str] = Counter()
        self.held = Held()  #: by the ranks of this process
        self._copies = copies
        self._weights: Weights | None = None  # None until it is known where the model is
        self._plans: dict[int, SpawnPlan] = {}

    def share(self) -> SpawnExecutor:
        """Another executor on the same workers."""
        workers, copies = self.workers, self._copies
        timeout = workers.timeout
        return SpawnExecutor(self.world_size, timeout=timeout, compile=self.compile, workers=workers, copies=copies)

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
            NotImplementedError: an operator is registered by the script itself, or the device is of another kind.
            OSError: too little shared memory, or too low a limit of open files.
            RankError: a worker did not start, or could not load its program.
            ValueError: fewer devices than ranks, tensors on several devices, or CUDA graphs on the CPU.
        """
        device = _one_device(plan, weights, inputs)
        inductor, graph = compilers(self.compile, device)
        self.workers.check(device)
        refuse_script({node.target for node in plan.graph.nodes if isinstance(node.target, OpOverload)})
        network = self.workers.started(device)
        with self.workers.ending("in an earlier call"):
            return self._load(plan, network, device, weights, inputs, inductor=inductor, graph=graph)

    def _load(
        self,
        plan: PlanLike,
        network: Network,
        device: torch.device,
        weights: Sequence[Tensor],
        inputs: Sequence[Tensor],
        *,
        inductor: bool,
        graph: bool,
    ) -> SpawnPlan:
        names = list(plan.program.weights.values())
        if self._weights is None:
            kind = CopiedWeights if self._copies or device.type != "cpu" else SharedWeights
            self._weights = kind(self.workers, self._scope)
        self._drop_weights(names)
        placement = plan.placement
        needed = {
            process: dict.fromkeys(placeholders_on(plan.program, plan.graph, placement.ranks(process)))
            for process in range(1, self.world_size)
        }
        readers = {
            name: [p for p, some in needed.items() if each in some] for each, name in plan.program.weights.items()
        }
        self._weights.bring(names, weights, readers, look=False, seconds=START)
        self.workers.share_numerics()
        number = self.workers.number()
        constants = [constant.cpu() for constant in plan.program.constants.values()]
        size = sum(tensor.nbytes for tensor in (*constants, *inputs))
        check_shm(size, "sharing this call's inputs and the model's constants")
        with torch.inference_mode(False):  # later calls write to them, also outside inference mode
            shared = [torch.empty_like(tensor, device="cpu") for tensor in inputs]
        on_host = [tensor.device.type == "cpu" for tensor in inputs]
        others = placeholders(plan.program)[len(names) :]
        for process, some in needed.items():
            programs = [StepPrograms(plan.graph, rank) for rank in placement.ranks(process)]
            loaded = LoadedPlan(
                [*some, *others],
                self._scoped([plan.program.weights[each] for each in some]),
                constants,
                shared,
                on_host,
                placement,
                [(each.channels, each.state) for each in programs],
                inductor,
                graph,
            )
            self.workers.send_to(process, ("load", number, loaded))
        steps = steps_of(plan, network, device, self.traffic, compile=inductor, graph=graph, sharing=self.world_size)
        self.workers.answers(START)
        self._plans[number] = found = SpawnPlan(self, number, plan, steps, shared, readers, inductor=inductor)
        return found

    def forget(self, numbers: Sequence[int]) -> None:
        self.held.forget(numbers)
        if not self.workers.ended:
            with self._releasing():
                self.workers.send(("forget", list(numbers)))

    def begin(self, device: torch.device) -> None:
        if self.ended:
            raise RuntimeError(f"the worker processes have ended ({self.ended}); call fxpass.parallelize again")
        self.workers.check(device)

    def failed(self, error: BaseException) -> None:
        pass  # workers take no part before the run, and `run` ends them if it fails

    def close(self) -> None:
        """Leave the workers. They end when no other executor uses them."""
        for plan in list(self._plans.values()):
            self.release(plan)
        if not self.workers.ended:
            with self._releasing():
                self._drop_weights(())
        self._weights = None
        if not self._closed:
            self._closed = True
            self.workers.leave(self)

    def run(
        self,
        plan: SpawnPlan,
        weights: Sequence[Tensor],
        inputs: Sequence[Tensor],
        step: Step,
        holding: Holding,
        *,
        look: bool,
    ) -> list[Tensor]:
        """Rank 0's outputs, once all ranks are done. If a rank fails, all workers end.

        Args:
            look: find out whether the contents of weights have changed in a way that torch does not count.

        Raises:
            RankError: with the worker's own traceback.
        """
        with self.workers.ending("in an earlier call"):
            assert self._weights is not None
            self._weights.bring(plan.names, weights, plan.readers, look=look, seconds=self.workers.timeout)
            self.workers.share_numerics()
            for buffer, tensor in zip(plan.shared, inputs, strict=True):
                buffer.copy_(tensor)
            self.workers.calls += 1
            assert self.workers.network is not None
            self.workers.network.board.call = self.workers.calls
            mode = plan.steps.mode(step)
            self._send_code(plan, mode)
            self.workers.send(("run", plan.number, self.workers.calls, step.context, mode, step.pace, holding))
            with _computing_with(self.workers.threads):
                outputs = plan.steps.run(weights, inputs, step.context, mode, step.pace, self.held, holding)
            self.workers.answers(self.workers.timeout)
        return outputs[0]

    def _send_code(self, plan: SpawnPlan, mode: Mode) -> None:
        """Send the workers the code of a mode, if they do not have it."""
        if mode in plan.sent:
            return
        for process in range(1, self.world_size):
            programs = [StepPrograms(plan.plan.graph, rank) for rank in plan.plan.placement.ranks(process)]
            codes = [coder(each, compile=plan.inductor)(mode) for each in programs]
            self.workers.send_to(process, ("code", plan.number, mode, codes))
        self.workers.answers(START)
        plan.sent.add(mode)

    def _scoped(self, names: Sequence[str]) -> list[str]:
        """Names of weights, as the workers know them."""
        return [self._scope + name for name in names]

    def release(self, plan: SpawnPlan) -> None:
        """Remove a plan from the workers. Its weights stay for the next one: a new adapter leaves most as they are."""
        plan.steps.forget_graphs()
        if self._plans.pop(plan.number, None) is None or self.workers.ended:
            return
        with self._releasing():
            self.workers.send(("release", plan.number))
            plan.steps.close()

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """If a rank is lost meanwhile, the next call raises, with the reason."""
        with suppress(ConnectionError):
            try:
                yield
            except RankError as error:  # a message may have been sent in part: no other can follow it
                self.workers.stop(f"as something was released: {str(error).partition(chr(10))[0]}")

    def _drop_weights(self, needed: Sequence[str]) -> None:
        """Remove the weights from the workers that neither a plan nor `needed` names."""
        if self._weights is None:
            return
        used = {name for plan in self._plans.values() for name in plan.names} | set(needed)
        unused = [name for name in self._weights.names() if name not in used]
        self._weights.drop(unused)
        self.workers.send(("drop", self._scoped(unused)))


class SpawnPlan:
    """A plan loaded on all ranks."""

    def __init__(
        self,
        executor: SpawnExecutor,
        number: int,
        plan: PlanLike,
        steps: RankSteps,
        shared: list[Tensor],
        readers: Readers,
        *,
        inductor: bool,
    ) -> None:
        self.executor = executor
        self.number = number
        self.plan = plan
        self.steps = steps
        self.readers = readers
        self.inductor = inductor
        self.names = list(plan.program.weights.values())
        self.shared = shared  #: shared buffers for the inputs of a call
        self.sent: set[Mode] = set()  #: modes whose code the workers have
        self._generations: deque[int] = deque(maxlen=GENERATIONS)  #: announced ones that have had a call
        self._look = True  #: whether this call may be the first of a generation

    def decide(self, inputs: Sequence[Tensor], question: Question) -> Step:
        self._look = not question.call or question.generation not in self._generations
        if question.call and self._look:
            self._generations.append(question.generation)
        return question.decide(on_host(question.facts))

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step, holding: Holding = NOTHING
    ) -> list[Tensor]:
        return self.executor.run(self, weights, inputs, step, holding, look=self._look)

    @property
    def compiled(self) -> Sequence[Report]:
        return self.steps.runners[0].reports

    def release(self) -> None:
        self.executor.release(self)


def _one_device(plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> torch.device:
    """The device of a plan. Numbers may be on the CPU, wherever the model is.

    Raises:
        ValueError: the model or an input is on another device than the rest.
    """
    device = device_of([*weights, *inputs])
    places = [f"input {path}" for path in plan.program.input_paths]
    places = [f"weight {name}" for name in plan.program.weights.values()] + places
    for place, tensor in zip(places, (*weights, *inputs), strict=True):
        if tensor.device != device and tensor.device.type != "cpu":
            raise ValueError(
                f"{place} is on {tensor.device}, but {places[0]} is on {device}; move the model and its inputs to one "
                "device"
            )
    return device


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
