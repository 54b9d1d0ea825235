"""Runs one rank's step programs: which mode a step has, and what is kept from one step to the next."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ir.code import Run, StepCode
from ..ir.mesh import Placement
from ..ir.program import Program
from ..ir.step import PACE, ChannelSpec, Mode, StateSpec, Step
from ..passes.codegen import step_code
from ..passes.lower_comm import StepPrograms
from .channels import Channel, RankChannel
from .executor import PlanLike, Report

if TYPE_CHECKING:
    from .segments import Compiler


@dataclass(frozen=True, eq=False)
class LoadedPlan:
    """What a worker needs of a plan, beside its codes."""

    names: list[str]  #: the placeholders of weights, constants and inputs
    weights: list[str]  #: qualified names of the weights that the worker's ranks need
    constants: list[Tensor]
    inputs: list[Tensor]  #: shared buffers in host memory
    on_host: list[bool]  #: of each input: it stays on the CPU, wherever the model is
    placement: Placement  #: which process runs which ranks
    ranks: list[tuple[tuple[ChannelSpec, ...], tuple[StateSpec, ...]]]  #: of each of the worker's ranks
    compile: bool
    graph: bool  #: record steps as CUDA graphs


class ContextState:
    """What one rank keeps in one context: channels, state, and where the context stands."""

    def __init__(self) -> None:
        self.channels: Sequence[Channel] | None = None  #: None until it is opened
        self.state: list[Tensor] = []
        self.steps = 0  #: begun so far; counted on rank 0, which tells the others the mode
        self.exact = False  #: whether the last one was
        self.lent = (
            False  #: whether others write to the receive buffers again, so that nothing of a step may stay there
        )

    def next(self, step: Step) -> Mode:
        """The mode of a step that follows the last one; it counts as run from now on."""
        if not step.exact and not self.steps:
            raise ValueError("the first step of a context is exact")
        paced = bool(step.pace) and self.steps >= 2
        after_exact = self.exact
        self.steps += 1
        self.exact = step.exact
        if step.exact:
            return "exact"
        if after_exact:
            return "first" if paced else "first unpaced"
        return "steady" if paced else "steady unpaced"

    def overwrite(self, values: Sequence[Tensor]) -> None:
        """Take these values as the new state, at the addresses of the old one."""
        held = {value.untyped_storage().data_ptr() for value in self.state}
        changed = [(old, value) for old, value in zip(self.state, values, strict=True) if old is not value]
        moving = [value for _, value in changed if value.untyped_storage().data_ptr() in held]
        copied = {id(value): torch.empty_like(value) for value in moving}  # what moves to another place
        copy_all([(copied[id(value)], value) for value in moving])
        copy_all([(old, copied.get(id(value), value)) for old, value in changed])


def copies(values: Sequence[Any]) -> list[Any]:
    """Copies of tensors; other values stay."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy to the first of each pair from the second, in few kernels on a GPU."""
    alike: defaultdict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in pairs:  # torch has one kernel for many copies where all have one dtype and keep their strides
        alike[source.dtype, target.stride() == source.stride()].append((target, source))
    for group in alike.values():
        torch._foreach_copy_([target for target, _ in group], [source for _, source in group])


def as_tensor(pace: float) -> Tensor:
    """The pace of a step, as programs take it."""
    return torch.tensor(pace, dtype=torch.float64)


class StepRunner:
    """Runs the steps of one rank of one plan.

    Args:
        names: the placeholders of weights, constants and inputs, in this order.
        constants: those of the program, on `device`.
        state: what a context keeps.
        specs: its channels.
        code: gives the code of a mode.
        traffic: counts the bytes that this rank receives, by role.
        compiler: compiles the segments of the codes, which must have some.
        soon: modes that are compiled together with the first one.

    Attributes:
        fixed: keep the state at the same addresses, so that a step can be recorded as a graph.
    """

    fixed = False

    def __init__(
        self,
        names: Sequence[str],
        constants: Sequence[Tensor],
        state: Sequence[StateSpec],
        specs: Sequence[ChannelSpec],
        code: Callable[[Mode], StepCode],
        device: torch.device,
        traffic: Counter[str],
        compiler: Compiler | None = None,
        soon: Sequence[Mode] = (),
    ) -> None:
        self._compiler = compiler
        self._soon = soon
        self._constants = list(constants)
        self._state = state
        self._code = code
        self.specs = specs
        self.device = device
        self._traffic = traffic
        self._place = {name: i for i, name in enumerate([*names, PACE, *(spec.name for spec in state)])}
        self._orders: dict[StepCode, list[int]] = {}
        self._contexts: defaultdict[int, ContextState] = defaultdict(ContextState)

    @staticmethod
    def of(
        plan: PlanLike,
        rank: int,
        device: torch.device,
        traffic: Counter[str],
        *,
        compile: bool = False,  # noqa: A002
        check: bool = False,
        sharing: int = 1,
        here: Sequence[int] = (),
    ) -> StepRunner:
        """The runner of a rank in a process that has the plan.

        Args:
            sharing: the processes that share this machine's cores when they compile.
            here: the ranks of this process, if what they send each other does not count as traffic.
        """
        programs = StepPrograms(plan.graph, rank)
        return StepRunner(
            placeholders(plan.program),
            [constant.to(device) for constant in plan.program.constants.values()],
            programs.state,
            programs.channels,
            coder(programs, compile=compile, check=check, here=here),
            device,
            traffic,
            new_compiler(rank, sharing) if compile else None,
            ("steady",) if plan.exact_steps else (),
        )

    @property
    def reports(self) -> list[Report]:
        """What has been compiled so far."""
        return [self._compiler.report] if self._compiler and self._compiler.report else []

    def mode(self, step: Step) -> Mode:
        """The mode of a step, which counts as run from now on."""
        return self._contexts[step.context].next(step)

    def start(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], context: int, mode: Mode, pace: Tensor) -> Run:
        """A step, to be driven; it returns (outputs, new state). The context has its channels.

        Args:
            weights, inputs: in the order of the program.
            pace: 0-dim float64.
        """
        here = self._contexts[context]
        code = self._code(mode)
        pool = [*weights, *self._constants, *inputs, pace, *here.state]
        if code not in self._orders and self._compiler:
            new = [each for each in [code, *map(self._code, self._soon)] if each not in self._orders]
            self._compiler.prepare([(each, self._values(each, pool)) for each in dict.fromkeys(new)], self.specs)
        values = self._values(code, pool)
        del pool
        compiled = self._compiler.segments(code) if self._compiler else None
        run = code.run(values, compiled)
        del values
        apart = self.fixed or here.lent
        saved: list[Tensor | None] | None = None
        received: list[Tensor] | None = None
        box: list[Any] = []  # holds what is put only until it is yielded
        while True:
            try:
                box.append(run.send(received))
            except StopIteration as stop:
                outputs, state = stop.value
                break
            received = None
            if box[0][0] != "keep":
                received = yield box.pop()
                continue
            _, _, (outputs, state) = box.pop()
            if apart:
                here.overwrite(state)
                saved = copies(outputs)
            del outputs, state
        if not apart:
            here.state = state
        elif saved is None:
            here.overwrite(state)
        else:
            outputs = [now if each is None else each for each, now in zip(saved, outputs, strict=True)]
        return outputs, here.state

    def _values(self, code: StepCode, pool: Sequence[Tensor]) -> list[Tensor]:
        """Those of a code's placeholders."""
        if code not in self._orders:
            self._orders[code] = [self._place[name] for name in code.placeholders]
        return [pool[i] for i in self._orders[code]]

    def count(self, mode: Mode) -> None:
        """Count what a step of a mode has received."""
        self._traffic.update(self._code(mode).received)

    def canonical(self, mode: Mode) -> Mode:
        """The mode whose program a mode runs."""
        return self._code(mode).mode

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], context: int, mode: Mode, pace: float
    ) -> list[Tensor]:
        """The flat outputs of a step.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        channels = self.channels(context)
        outputs, _ = drive(self.start(weights, inputs, context, mode, as_tensor(pace)), channels)
        self.count(mode)
        return copies(outputs) if self._contexts[context].lent else outputs

    def is_open(self, context: int) -> bool:
        """Whether a context has channels."""
        return self._contexts[context].channels is not None

    def open(self, context: int, channels: Sequence[Channel]) -> None:
        """Give a new context its channels, and zeros as its state."""
        here = self._contexts[context]
        here.channels = channels
        here.lent = any(channel.lends for channel in channels)
        with torch.inference_mode(False):  # later calls may write to it, also outside inference mode
            here.state = [torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for spec in self._state]

    def channels(self, context: int) -> Sequence[Channel]:
        """Those of a context."""
        channels = self._contexts[context].channels
        assert channels is not None, f"context {context} has no channels"
        return channels

    def kept(self) -> list[Tensor]:
        """The state of all contexts."""
        return [value for context in self._contexts.values() for value in context.state]

    def close(self) -> None:
        """Receive what is in flight, and forget all contexts. All ranks call it."""
        for context in self._contexts.values():
            for channel in context.channels or ():
                channel.close()
        self._contexts.clear()


def drive(run: Run, channels: Sequence[Channel]) -> tuple[list[Tensor], list[Tensor]]:
    """Run one rank's step to its end; returns (outputs, new state)."""
    received: list[Tensor] | None = None
    try:
        while True:
            act, channel, packed = run.send(received)
            received = None
            if act == "put":
                channels[channel].put(packed)
            else:
                received = channels[channel].get()
            packed = None
    except StopIteration as stop:
        return stop.value


def run_in_turns(runs: Sequence[Run], channels: Sequence[Sequence[Channel]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """One step of the ranks of this process: each runs until it needs what another has not put yet.

    If none can go on, this waits for other processes, at the get of the rank that is furthest behind. All ranks put and
    get in one order. So all ranks of this process have put whatever others need to get there, and of all processes the
    one with the rank furthest behind can go on.

    Returns:
        (outputs, state) of each.

    Raises:
        AssertionError: every rank waits for another one of this process.
        RankError: a rank of another process failed, left, or did not answer in time.
    """
    results: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    at: dict[int, int | None] = dict.fromkeys(range(len(runs)))  #: the channel at whose get a rank waits
    acts = [0] * len(runs)  #: puts and gets so far
    moving = True
    while len(results) < len(runs):
        waited = None
        if not moving:
            waited = min((rank for rank in at if rank not in results), key=acts.__getitem__)
            channel = at[waited]
            assert channel is not None
            behind = channels[waited][channel]
            assert isinstance(behind, RankChannel), f"{type(behind).__name__} has no message"
            assert behind.waits_for_others, (
                f"every rank waits for another one, at channels {sorted({c for c in at.values() if c is not None})}"
            )
        moving = False
        for rank, ends in enumerate(channels):
            if rank in results or waited not in (None, rank):
                continue
            waiting = at[rank]
            while waiting is None or rank == waited or ends[waiting].ready():
                moving, waited = True, None
                received = None if waiting is None else ends[waiting].get()
                try:
                    act, channel, packed = runs[rank].send(received)
                except StopIteration as stop:
                    results[rank] = stop.value
                    at[rank] = None
                    break
                received = None
                acts[rank] += 1
                waiting = None
                if act == "put":
                    ends[channel].put(packed)
                    packed = None
                else:
                    waiting = channel
            at[rank] = waiting
    return [results[rank] for rank in range(len(runs))]


def new_compiler(rank: int, sharing: int) -> Compiler:
    """A compiler; loads Inductor, which takes seconds.

    Args:
        sharing: the ranks that share this machine's cores.
    """
    from .segments import Compiler

    return Compiler(rank, sharing=sharing)


def placeholders(program: Program) -> list[str]:
    """Those of a program's weights, constants and inputs."""
    return [*program.weights, *program.constants, *program.inputs]


def coder(
    programs: StepPrograms,
    *,
    compile: bool = False,  # noqa: A002
    check: bool = False,
    here: Sequence[int] = (),
) -> Callable[[Mode], StepCode]:
    """Gives the code of each mode of a rank, which is written when it is first asked for.

    Args:
        here: as of `StepRunner.of`.
    """
    written: dict[Mode, StepCode] = {}

    def code(mode: Mode) -> StepCode:
        mode = programs.canonical(mode)
        if mode not in written:
            code = step_code(programs[mode], check=check, segmented=compile)
            written[mode] = replace(code, received=programs[mode].received(here)) if len(here) > 1 else code
        return written[mode]

    return code
