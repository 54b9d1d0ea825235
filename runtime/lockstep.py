"""All ranks in this process, each run from exchange to exchange: for tests, notebooks and quality studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.mesh import Placement
from ..ir.step import EXACT, ChannelSpec, Step
from .channels import Channel, RankChannel, Tamper
from .executor import Compile, PlanLike, Question, Report, compilers, device_of, on_host
from .held import NOTHING, Held, Holding
from .rank_steps import RankSteps
from .step_runner import StepRunner


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
        self.held = Held()

    def share(self) -> LockstepExecutor:
        """Another executor like this one."""
        return LockstepExecutor(self.world_size, tamper=self.tamper, check=self.check, compile=self.compile)

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> LockstepPlan:
        return LockstepPlan(self, plan, inputs)

    def forget(self, numbers: Sequence[int]) -> None:
        self.held.forget(numbers)

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
        device = device_of(inputs)
        inductor, graph = compilers(executor.compile, device)
        others: Counter[str] = Counter()  # what all ranks but the first receive is not counted
        every = range(plan.world_size)

        def opened(specs: Sequence[ChannelSpec]) -> list[list[Channel]]:
            ends = [RankChannel.of_ranks(spec, every, device, tamper=executor.tamper) for spec in specs]
            return [[of_ranks[rank] for of_ranks in ends] for rank in every]

        self.ranks = [
            StepRunner.of(
                plan,
                rank,
                device,
                others if rank else executor.traffic,
                compile=inductor,
                check=executor.check,
            )
            for rank in every
        ]
        # messages between ranks have no fixed places here: only one rank's steps can be recorded
        self.steps = RankSteps(self.ranks, opened, Placement((plan.world_size,)), graph=graph)

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
            mode = self.steps.mode(step)
            return self.steps.run(weights, inputs, step.context, mode, step.pace, self.executor.held, holding)
        except BaseException:
            self.steps.close()  # some ranks have put more messages than others
            raise

    @property
    def compiled(self) -> Sequence[Report]:
        return self.ranks[0].reports if self.ranks else []

    def release(self) -> None:
        self.steps.close()
        self.ranks.clear()
