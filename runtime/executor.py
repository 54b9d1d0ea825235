"""What all executors have in common: they load a plan once and run it many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ..ir.program import Program
from .interpreter import RankProgram


@dataclass(frozen=True)
class Report:
    """What compiling a rank's program took."""

    rank: int
    displaced: bool  #: for displaced steps only, because their attention has windows
    seconds: float
    cached: bool  #: whether an earlier compilation was found in Inductor's cache


@dataclass(frozen=True)
class Step:
    """How a call is to be run. All ranks are given the same."""

    context: int = 0  #: whose stale state it reads and writes: one number per guidance branch
    exact: bool = True  #: use what the others send now, whatever is declared stale
    pace: float = 0.0  #: its length in units of the last step's, in timesteps; 0 if one of them is not known


EXACT = Step()


class PlanLike(Protocol):
    """What an executor reads of a plan."""

    @property
    def program(self) -> Program: ...
    @property
    def graph(self) -> fx.Graph: ...
    @property
    def world_size(self) -> int: ...
    @property
    def fingerprint(self) -> Any: ...  # a str; type checkers do not take a cached property for one
    @property
    def exact_steps(self) -> tuple[int, int] | None: ...


class Loaded(Protocol):
    """A plan that an executor has made ready."""

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """The flat outputs; gradients must be off.

        Args:
            weights: the model's own tensors, in the order of `plan.program.weights`.
            inputs: in the order of `plan.program.inputs`.
            step: if it is not exact, an earlier call of the same context was.
        """
        ...

    @property
    def compiled(self) -> Sequence[Report]:
        """What this process has compiled of it."""
        ...

    def release(self) -> None:
        """Give back what the plan holds on all ranks."""
        ...


class Executor(Protocol):
    """Runs plans on `world_size` ranks."""

    world_size: int

    @property
    def traffic(self) -> Mapping[str, int]:
        """Bytes that this process received so far, by role of the exchange."""
        ...

    @property
    def ended(self) -> str | None:
        """Why no further call can be made; None if calls can be made."""
        ...

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Loaded: ...

    def begin(self, device: torch.device) -> None:
        """A call on `device` begins.

        Raises:
            RuntimeError: an earlier call left the ranks in a state from which they cannot go on.
            RankError: at the first call, another rank did not come.
        """
        ...

    def failed(self, error: BaseException) -> None:
        """The call has failed on this rank: tell the others, if there are any."""
        ...

    def close(self) -> None:
        """Leave nothing behind. May be called twice."""
        ...


@dataclass(eq=False)
class Bound:
    """A rank's program with its constants on the device, ready to take weights and inputs."""

    code: RankProgram
    constants: list[Tensor]
    order: list[int]  #: of each placeholder, its place in weights + constants + inputs

    @staticmethod
    def of(code: RankProgram, program: Program, device: torch.device) -> Bound:
        names = [*program.weights, *program.constants, *program.inputs]
        place = {name: i for i, name in enumerate(names)}
        unknown = [name for name in code.placeholders if name not in place]
        if unknown:
            raise ValueError(f"the plan's graph has placeholders that its program does not know: {unknown}")
        constants = [constant.to(device) for constant in program.constants.values()]
        return Bound(code, constants, [place[name] for name in code.placeholders])

    def values(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """One value per placeholder."""
        pool = [*weights, *self.constants, *inputs]
        return [pool[i] for i in self.order]


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where a call runs: on its tensors' device; numbers may be on the CPU beside it."""
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
