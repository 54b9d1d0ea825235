"""All ranks in this process, each run from exchange to exchange: for tests, notebooks and quality studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..ir.step import EXACT, ChannelSpec, Mode, Step
from .channels import Channel, InProcessChannel, Tamper
from .executor import Compile, PlanLike, Question, Report, compilers, device_of, on_host
from .graphs import StepGraphs, cuda_recorder
from .held import NOTHING, Held, Holding
from .step_runner import StepRunner, as_tensor, run_in_turns


class LockstepExecutor:
    """Runs the ranks of a plan one after the other, and checks that they meet at the same exchanges.

    Args:
        tamper: changes payloads on their way (for tests: a corrupted exchange must change the output).
        check: compare the shape of each local value with what its layout says.
        compile: compile what the ranks do between exchanges.
    """

    def __init__(
        self,
        world_size: int,
        *,
        tamper: Tamper | None = None,
        check: bool = False,
        compile: Compile = False,  # noqa: A002
    ) -> None:
        self.compile: Compile = compile
        self.world_size = world_size
        self.ended: str | None = None
        self.traffic: Counter[str] = Counter()
        self.tamper = tamper
        self.check = check
        self.held = [Held() for _ in range(world_size)]  #: by rank

    def share(self) -> LockstepExecutor:
        """Another executor like this one."""
        return LockstepExecutor(self.world_size, tamper=self.tamper, check=self.check, compile=self.compile)

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> LockstepPlan:
        return LockstepPlan(self, plan, inputs)

    def forget(self, numbers: Sequence[int]) -> None:
        for held in self.held:
            held.forget(numbers)

    def begin(self, device: torch.device) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        pass

    def close(self) -> None:
        pass


class LockstepPlan:
    """A plan with the runners of all its ranks."""

    def __init__(self, executor: LockstepExecutor, plan: PlanLike, inputs: Sequence[Tensor]) -> None:
        self.executor = executor
        self.device = device_of(inputs)
        self.world = plan.world_size
        self._ends: list[list[Channel]] = []  #: of the context that is opened
        inductor, graph = compilers(executor.compile, self.device)
        others: Counter[str] = Counter()  # what all ranks but the first receive is not counted
        self.ranks = [
            StepRunner.of(
                plan,
                rank,
                partial(self._open, rank),
                self.device,
                others if rank else executor.traffic,
                compile=inductor,
                check=executor.check,
            )
            for rank in range(plan.world_size)
        ]
        recorded = graph and not self.ranks[0].specs  # messages between ranks have no fixed places here
        self._record = cuda_recorder(self.device) if recorded else None
        self._graphs: dict[int, StepGraphs] = {}  #: by context

    def decide(self, inputs: Sequence[Tensor], question: Question) -> Step:
        return question.decide(on_host(question.facts))

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step, holding: Holding = NOTHING
    ) -> list[Tensor]:
        """Rank 0's outputs."""
        return self.run_all(weights, inputs, step, holding)[0]

    def run_all(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step = EXACT, holding: Holding = NOTHING
    ) -> list[list[Tensor]]:
        """The outputs of every rank.

        Raises:
            AssertionError: every rank waits for another one, or a payload has not the declared shape.
        """
        try:
            modes: list[Mode] = [rank.mode(step) for rank in self.ranks]
            assert len(set(modes)) == 1
            if self._record and not holding.takes:  # all ranks have the same inputs
                if step.context not in self._graphs:
                    self._graphs[step.context] = StepGraphs(self.ranks, step.context, self.device, self._record)
                found = self._graphs[step.context].run(weights, inputs, modes[0], step.pace)
            else:
                channels = [rank.channels(step.context) for rank in self.ranks]
                pace = as_tensor(step.pace)
                given = [held.inputs(inputs, holding) for held in self.executor.held]
                runs = [
                    rank.start(weights, own, step.context, modes[0], pace)
                    for rank, own in zip(self.ranks, given, strict=True)
                ]
                del given
                found = [outputs for outputs, _ in run_in_turns(runs, channels)]
                for rank in self.ranks:
                    rank.count(modes[0])
            return [held.outputs(each, holding) for held, each in zip(self.executor.held, found, strict=True)]
        except BaseException:
            self._forget()  # some ranks have put more messages than others
            raise

    @property
    def compiled(self) -> Sequence[Report]:
        return self.ranks[0].reports if self.ranks else []

    def release(self) -> None:
        self._forget()
        self.ranks = []

    def _open(self, rank: int, specs: Sequence[ChannelSpec]) -> list[Channel]:
        """Called for rank 0 first: it opens the ends of all ranks."""
        if rank == 0:
            tamper = self.executor.tamper
            ends = [InProcessChannel.of_all_ranks(spec, self.world, self.device, tamper) for spec in specs]
            self._ends = [[of_ranks[r] for of_ranks in ends] for r in range(self.world)]
        return self._ends[rank]

    def _forget(self) -> None:
        self._graphs.clear()  # before what they read
        for rank in self.ranks:
            rank.close()
