"""Runs one rank's step programs: which mode a step has, and what is kept from one step to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ir.program import Program
from ..ir.step import PACE, ChannelSpec, Mode, StateSpec
from ..passes.lower_comm import StepPrograms
from .channels import Channel
from .executor import PlanLike, Report, Step
from .step_code import Run, StepCode, drive

if TYPE_CHECKING:
    from .segments import Compiler


@dataclass(frozen=True, eq=False)
class LoadedPlan:
    """What a worker needs of a plan, beside its codes."""

    names: list[str]  #: the placeholders of weights, constants and inputs
    weights: list[str]  #: qualified names
    constants: list[Tensor]
    inputs: list[Tensor]  #: shared buffers
    channels: tuple[ChannelSpec, ...]
    state: tuple[StateSpec, ...]
    compile: bool


class History:
    """What a context has run so far: it tells the mode of the next step."""

    def __init__(self) -> None:
        self.steps = 0
        self.exact = False  #: whether the last step was

    def next(self, step: Step) -> Mode:
        """The mode of a step that follows the last one; it counts as run from now on."""
        if not step.exact and not self.steps:
            raise ValueError("the first step of a context is exact")
        paced = bool(step.pace) and self.steps >= 2
        displaced: Mode = "first" if self.exact else "steady"
        self.steps += 1
        self.exact = step.exact
        if step.exact:
            return "exact"
        return displaced if paced else f"{displaced} unpaced"  # type: ignore[return-value]


class ContextState:
    """One rank's channels and state in one context."""

    def __init__(self, channels: Sequence[Channel], state: Sequence[StateSpec], device: torch.device) -> None:
        self.channels = channels
        self.state = [torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in state]


class StepRunner:
    """Runs the steps of one rank of one plan.

    Args:
        names: the placeholders of weights, constants and inputs, in this order.
        constants: those of the program, on `device`.
        state: what a context keeps.
        code: gives the code of a mode.
        open_channels: opens the channels of a context. All ranks open the same contexts in the same order.
        traffic: counts the bytes that this rank receives, by role.
        compiler: compiles the segments of the codes, which must have some.
    """

    def __init__(
        self,
        names: Sequence[str],
        constants: Sequence[Tensor],
        state: Sequence[StateSpec],
        code: Callable[[Mode], StepCode],
        open_channels: Callable[[], Sequence[Channel]],
        device: torch.device,
        traffic: Counter[str],
        compiler: Compiler | None = None,
    ) -> None:
        self._compiler = compiler
        self._constants = list(constants)
        self._state = state
        self._code = code
        self._open = open_channels
        self._device = device
        self._traffic = traffic
        self._place = {name: i for i, name in enumerate([*names, PACE, *(spec.name for spec in state)])}
        self._orders: dict[StepCode, list[int]] = {}
        self._contexts: dict[int, ContextState] = {}
        self._histories: dict[int, History] = {}

    @staticmethod
    def of(
        plan: PlanLike,
        rank: int,
        open_channels: Callable[[Sequence[ChannelSpec]], Sequence[Channel]],
        device: torch.device,
        traffic: Counter[str],
        *,
        compile: bool = False,  # noqa: A002
        check: bool = False,
    ) -> StepRunner:
        """The runner of a rank in a process that has the plan."""
        programs = StepPrograms(plan.graph, rank)
        return StepRunner(
            placeholders(plan.program),
            [constant.to(device) for constant in plan.program.constants.values()],
            programs.state,
            coder(programs, compile=compile, check=check),
            lambda: open_channels(programs.channels),
            device,
            traffic,
            new_compiler(rank) if compile else None,
        )

    @property
    def reports(self) -> list[Report]:
        """What has been compiled so far."""
        return [self._compiler.report] if self._compiler and self._compiler.report else []

    def mode(self, step: Step) -> Mode:
        """The mode of a step, which counts as run from now on."""
        return self._histories.setdefault(step.context, History()).next(step)

    def start(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], context: int, mode: Mode, pace: float) -> Run:
        """A step, to be driven; it returns (outputs, new state).

        Args:
            weights, inputs: in the order of the program.
        """
        here = self._context(context)
        code = self._code(mode)
        if code not in self._orders:
            self._orders[code] = [self._place[name] for name in code.placeholders]
        pool = [*weights, *self._constants, *inputs, torch.tensor(pace, dtype=torch.float64), *here.state]
        values = [pool[i] for i in self._orders[code]]
        del pool
        compiled = self._compiler.segments(code) if self._compiler else None
        outputs, here.state = yield from code.run(values, compiled)
        self._traffic.update(code.received)
        return outputs, here.state

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], context: int, mode: Mode, pace: float
    ) -> list[Tensor]:
        """The flat outputs of a step.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        channels = self.channels(context)
        return drive(self.start(weights, inputs, context, mode, pace), channels)[0]

    def channels(self, context: int) -> Sequence[Channel]:
        """Those of a context, which is opened if it is new."""
        return self._context(context).channels

    def kept(self) -> list[Tensor]:
        """The state of all contexts."""
        return [value for context in self._contexts.values() for value in context.state]

    def close(self) -> None:
        """Receive what is in flight, and forget all contexts. All ranks call it."""
        for context in self._contexts.values():
            for channel in context.channels:
                channel.close()
        self._contexts.clear()
        self._histories.clear()

    def _context(self, number: int) -> ContextState:
        if number not in self._contexts:
            self._contexts[number] = ContextState(self._open(), self._state, self._device)
        return self._contexts[number]


def new_compiler(rank: int) -> Compiler:
    """A compiler; loads Inductor, which takes seconds."""
    from .segments import Compiler

    return Compiler(rank)


def placeholders(program: Program) -> list[str]:
    """Those of a program's weights, constants and inputs."""
    return [*program.weights, *program.constants, *program.inputs]


def coder(programs: StepPrograms, *, compile: bool = False, check: bool = False) -> Callable[[Mode], StepCode]:  # noqa: A002
    """Gives the code of each mode of a rank, which is written when it is first asked for."""
    written: dict[Mode, StepCode] = {}

    def code(mode: Mode) -> StepCode:
        mode = programs.canonical(mode)
        if mode not in written:
            written[mode] = StepCode.of(programs[mode], check=check, segmented=compile)
        return written[mode]

    return code
