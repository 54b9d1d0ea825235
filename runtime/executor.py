"""The interface of executors: load a plan once, run it many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, fx

from ..ir.program import Program

#: how steps are compiled: True is "inductor" on the CPU, and "inductor+graph" on CUDA
Compile = bool | Literal["inductor", "graph", "inductor+graph"]
COMPILERS: tuple[str, ...] = get_args(get_args(Compile)[1])


@dataclass(frozen=True)
class Report:
    """What a rank has compiled of a plan so far."""

    rank: int
    segments: int  #: distinct ones
    seconds: float
    cached: bool  #: whether Inductor's cache had all of them


@dataclass(frozen=True)
class Step:
    """How to run a call; the same on all ranks."""

    context: int = 0  #: which stale state it reads and writes: one number per guidance branch
    exact: bool = True  #: use what the other ranks send in this step, also in exchanges declared stale
    pace: float = 0.0  #: timesteps of this step over those of the last; 0 if either is unknown
    generation: int = 0  #: the number of the generation in this module
    call: int = 0  #: the number of this call in the generation, from 1; 0 if nobody announced it


EXACT = Step()


class PlanLike(Protocol):
    """The part of a plan that executors use."""

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
    """A plan loaded by an executor."""

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """The flat outputs; gradients must be off.

        Args:
            weights: the model's own tensors, in the order of `plan.program.weights`.
            inputs: in the order of `plan.program.inputs`.
            step: a displaced one needs an earlier exact step of the same context.
        """
        ...

    @property
    def compiled(self) -> Sequence[Report]:
        """Compilation reports of this process's rank."""
        ...

    def release(self) -> None:
        """Free what the plan holds on all ranks."""
        ...


class Executor(Protocol):
    """Runs plans on `world_size` ranks."""

    world_size: int

    @property
    def traffic(self) -> Mapping[str, int]:
        """Bytes that this process has received so far, by the role of the exchange."""
        ...

    @property
    def ended(self) -> str | None:
        """Why no further call can be made; None if calls can be made."""
        ...

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Loaded: ...

    def begin(self, device: torch.device) -> None:
        """Begin a call on `device`.

        Raises:
            RuntimeError: the executor has ended, or an earlier call left the ranks out of step.
            RankError: at the first call, another rank did not arrive.
        """
        ...

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks, if there are any, that the call failed on this one."""
        ...

    def close(self) -> None:
        """Release all resources. May be called twice."""
        ...


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """The device of a call: that of its first tensor that is not on the CPU, for numbers may be there."""
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


def compilers(compile: Compile, device: torch.device) -> tuple[bool, bool]:  # noqa: A002
    """Whether Inductor compiles the segments of steps, and whether steps are recorded as CUDA graphs.

    Raises:
        ValueError: CUDA graphs were asked for, and the model is on another device.
    """
    if isinstance(compile, bool):
        return compile, compile and device.type == "cuda"
    if "graph" in compile and device.type != "cuda":
        raise ValueError(f"compile={compile!r} records CUDA graphs, but the model is on {device}; use compile=True")
    return "inductor" in compile, "graph" in compile
