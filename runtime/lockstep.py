"""All ranks in this process, each run from exchange to exchange: for tests, notebooks and quality studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..ir.step import ChannelSpec
from .channels import Channel, InProcessChannel, Tamper, TamperedChannel
from .executor import EXACT, PlanLike, Report, Step, device_of
from .step_code import Run
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
        compile: bool = False,  # noqa: A002
    ) -> None:
        self.compile = compile
        self.world_size = world_size
        self.ended: str | None = None
        self.traffic: Counter[str] = Counter()
        self.tamper = tamper
        self.check = check

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> LockstepPlan:
        return LockstepPlan(self, plan, inputs)

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
        others: Counter[str] = Counter()  # what all ranks but the first receive is not counted
        self.ranks = [
            StepRunner.of(
                plan,
                rank,
                partial(self._open, rank),
                self.device,
                others if rank else executor.traffic,
                compile=executor.compile,
                check=executor.check,
            )
            for rank in range(plan.world_size)
        ]

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """Rank 0's outputs."""
        return self.run_all(weights, inputs, step)[0]

    def run_all(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step = EXACT) -> list[list[Tensor]]:
        """The outputs of every rank.

        Raises:
            AssertionError: every rank waits for another one, or a payload has not the declared shape.
        """
        try:
            modes = [rank.mode(step) for rank in self.ranks]
            assert len(set(modes)) == 1
            channels = [rank.channels(step.context) for rank in self.ranks]
            runs = [rank.start(weights, inputs, step.context, modes[0], step.pace) for rank in self.ranks]
            return [outputs for outputs, _ in run_in_turns(runs, channels)]
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
            ends = [InProcessChannel.of_all_ranks(spec, self.world, self.device) for spec in specs]
            self._ends = [[self._tampered(of_ranks[r]) for of_ranks in ends] for r in range(self.world)]
        return self._ends[rank]

    def _tampered(self, channel: InProcessChannel) -> Channel:
        return TamperedChannel(channel, self.executor.tamper) if self.executor.tamper else channel

    def _forget(self) -> None:
        for rank in self.ranks:
            rank.close()


def run_in_turns(runs: Sequence[Run], channels: Sequence[Sequence[Channel]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """One step of all ranks: each runs until it needs what another has not put yet. Returns (outputs, state) of each.

    Raises:
        AssertionError: every rank waits for another one.
    """
    results: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    at: dict[int, int | None] = dict.fromkeys(range(len(runs)))  #: the channel at whose get a rank waits
    while len(results) < len(runs):
        moved = False
        for rank, ends in enumerate(channels):
            if rank in results:
                continue
            waiting = at[rank]
            while waiting is None or ends[waiting].ready():
                moved = True
                received = None if waiting is None else ends[waiting].get()
                try:
                    act, channel, packed = runs[rank].send(received)
                except StopIteration as stop:
                    results[rank] = stop.value
                    break
                waiting = None
                if act == "put":
                    ends[channel].put(packed)
                else:
                    waiting = channel
            at[rank] = waiting
        assert moved, f"every rank waits for another one, at channels {sorted({*at.values()} - {None})}"
    return [results[rank] for rank in range(len(runs))]
