"""The interface of executors: load a plan once, run it many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, fx

from ..ir.mesh import Placement
from ..ir.program import Program
from ..ir.step import Step
from .held import NOTHING, Holding

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
class Question:
    """How to run a call, which rank 0 decides from what it knows of its inputs (law 7).

    Attributes:
        facts: of this rank, float64 [n] each, on any device; of one size in all calls of a program.
        decide: makes a step of the numbers in `facts`. All ranks call it, with those of rank 0.
        generation: the number of the generation in this module.
        call: the number of this call in the generation, from 1; 0 if nobody announced it.
        together: how many calls have come that the step runs at once.
        state: a digest of what else `decide` reads, which is equal on all ranks unless they have run different calls.
        taken: a digest of which values that ranks have kept the call takes.
    """

    facts: Sequence[Tensor]
    decide: Callable[[Sequence[float]], Step]
    generation: int = 0
    call: int = 0
    state: int = 0
    together: int = 1
    taken: int = 0


class PlanLike(Protocol):
    """The part of a plan that executors use."""

    @property
    def program(self) -> Program: ...
    @property
    def graph(self) -> fx.Graph: ...
    @property
    def world_size(self) -> int:
        """The number of ranks."""
        ...

    @property
    def placement(self) -> Placement:
        """Which process runs which ranks."""
        ...

    @property
    def fingerprint(self) -> Any: ...  # a str; type checkers do not take a cached property for one
    @property
    def exact_steps(self) -> tuple[int, int] | None: ...
    @property
    def calls(self) -> int:
        """How many calls run at once: inputs and outputs are stacked, [calls, *shape]."""
        ...


class Loaded(Protocol):
    """A plan loaded by an executor."""

    def decide(self, inputs: Sequence[Tensor], question: Question) -> Step:
        """How to run a call with these inputs, the same on all ranks.

        Raises:
            RankError: another rank failed, ended, or did not answer in time.
            DisagreementError: on every rank, if the ranks have other inputs or are in other generations.
        """
        ...

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step, holding: Holding = NOTHING
    ) -> list[Tensor]:
        """The flat outputs; gradients must be off.

        Args:
            weights: the model's own tensors, in the order of `plan.program.weights`.
            inputs: in the order of `plan.program.inputs`.
            step: a displaced one needs an earlier exact step of the same context.
            holding: which inputs ranks have kept, and which outputs they keep: there, tensors without elements are
                given and returned.
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
    """Runs plans on `world_size` processes."""

    world_size: int

    @property
    def traffic(self) -> Mapping[str, int]:
        """Bytes that this process has received so far, by the role of the exchange."""
        ...

    @property
    def ended(self) -> str | None:
        """Why no further call can be made; None if calls can be made."""
        ...

    def share(self) -> Executor:
        """An executor for another module, with traffic of its own, on the same processes and connections.

        If one of them fails in the middle of a call, all end. Their calls must be made one after the other.
        """
        ...

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Loaded: ...

    def forget(self, numbers: Sequence[int]) -> None:
        """Free what the ranks have kept under these numbers."""
        ...

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


def on_host(parts: Sequence[Tensor]) -> list[float]:
    """The numbers in some tensors [n], in order. The host waits once for each device."""
    found: dict[int, list[float]] = {}
    for device in {part.device for part in parts}:
        here = [i for i, part in enumerate(parts) if part.device == device]
        numbers = torch.cat([parts[i] for i in here]).tolist()
        for i in here:
            found[i], numbers = numbers[: parts[i].numel()], numbers[parts[i].numel() :]
    return [number for i in range(len(parts)) for number in found[i]]
