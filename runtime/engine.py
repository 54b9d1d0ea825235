"""From a call to its program: capture once per signature, plan, run; the same for all executors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..capture import (
    Call,
    CaptureError,
    GuardError,
    Method,
    broken_guard,
    capture_call,
    check_memory,
    guard_error,
    outdated,
    returned,
)
from ..capture.structure import Structure, WeightTable
from ..capture.unread import Unread
from ..ir.advice import warn
from ..ir.program import Program
from ..ir.step import EXACT
from ..passes.limits import WorldSizeError
from .clock import Clock
from .errors import DisagreementError
from .executor import Executor, Loaded, PlanLike, Question, Report, device_of
from .generation import Generation, Generations
from .turn import Turn

SIGNATURES = 8  #: programs kept; the least recently used one is evicted first
GUARDED = 4  #: programs kept of one signature that differ only in guarded values; more captures in a row are an error
UNSPLIT = (CaptureError, GuardError, WorldSizeError)  #: errors after which a call of a method runs unsplit

Planner = Callable[[Program], PlanLike]


@dataclass(eq=False)
class Entry:
    """A captured program with its plan, loaded by the executor."""

    captured: Program
    plan: PlanLike
    loaded: Loaded
    weights: WeightTable
    clock: Clock | None  #: None if every step is exact
    hooks: bool  #: whether it holds the hooks of the model itself


class Engine:
    """Runs calls of `model` and of its methods on the ranks of `executor`, one after the other.

    A call of `model` itself is split or refused. A call of another method that cannot be split runs unsplit on every
    rank, and a warning says why; with `strict` it is refused, too.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        executor: Executor,
        *,
        strict: bool = False,
        turn: Turn | None = None,
        capturing: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            capturing: given the model, what it is captured in: a context that changes options of it, and back.
            turn: of all engines whose executors share processes; default: its own.
        """
        self.model = model
        self.executor = executor
        self.strict = strict
        self._capturing = capturing
        self.plan: PlanLike | None = None
        self._planner = planner
        self._entries: OrderedDict[Any, list[Entry]] = OrderedDict()
        self._structure: Structure | None = None
        self._unread = Unread()
        self._unsplit: set[Any] = set()  # keys of calls that cannot be split
        self._unsplit_structure: Structure | None = None  # of the model after the first of them
        self.turn = turn or Turn()
        self._closed: str | None = None
        self.before_call: list[Callable[[], None]] = []  #: each finds generations that nobody has announced yet
        self.calls = 0  #: how many calls were begun
        self._generations = Generations()
        self._evicted: set[int] = set()  # hashes of the keys whose programs were evicted
        self._hinted = False  # whether the warning about evictions was given
        self._said_idle = False  # whether the warning about steps that are all exact was given
        self._in_a_row = 0  # captures since the last call that reused a program

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None = None) -> Any:
        """The output of the model, or of one of its methods. Runs without autograd.

        Raises:
            RuntimeError: the module was closed, or gradients are enabled and the model is in training mode or an input
                requires one.
            CaptureError: the model cannot be captured.
            GuardError: it turns an input that differs at every call into a Python number.
            RankError: another rank failed.
        """
        for each in list(self.before_call):
            each()
        self.calls += 1
        gradients = torch.is_grad_enabled()
        if method is not None and self._must_be_plain(method, gradients, args, kwargs):
            return method.function(*args, **kwargs)
        with self.turn.taken(), torch.no_grad():
            if self._closed:
                raise RuntimeError(f"this parallel module was closed ({self._closed}); call fxpass.parallelize again")
            if self.model.training and gradients:
                raise RuntimeError(
                    "the model is in training mode and gradients are enabled; fxpass runs inference only: call "
                    "model.eval() first, or call it under torch.no_grad()"
                )
            try:
                self.executor.begin(self._device(args, kwargs))
                found = self._found(args, kwargs, method, gradients)
                if found is None:
                    assert method is not None
                    return self._run_unsplit(method, args, kwargs)
                call, entry = found
                self.plan = entry.plan
                generation = self._generations.current()
                generation.calls += 1
                step = entry.loaded.decide(call.tensors, _question(entry.clock, call.tensors, generation))
                self._say_idle(generation)
                outputs = entry.loaded.run(entry.weights.tensors(), call.tensors, step)
            except BaseException as error:
                for each in self._all():
                    if each.clock and isinstance(error, DisagreementError):
                        each.clock.forget()
                    elif each.clock:  # some exchanges may already have sent this step's values
                        each.clock.restart()
                self.executor.failed(error)
                raise
            return returned(entry.plan.program, outputs, call)

    def reset(self, timesteps: Sequence[float] = ()) -> None:
        """Begin a generation in this thread, with its timesteps if they are known: no earlier state is read."""
        with self.turn.taken():
            self._generations.begin(timesteps)

    def generation(self, timesteps: Sequence[float] = ()) -> Generation:
        """A generation of this module, to be entered."""
        return self._generations.new(timesteps)

    def close(self, why: str = "close() was called") -> None:
        """Release everything on all ranks; later calls raise."""
        with self.turn.taken():
            if not self._closed:
                self._closed = why
                try:
                    self._forget()
                finally:
                    self._entries.clear()
                    self.executor.close()

    @property
    def ended(self) -> str | None:
        """Why no further call can be made; None if calls can be made."""
        return self._closed or self.executor.ended

    @property
    def kinds(self) -> int:
        """The number of steps, the first ones of a generation, in which each kind of step is met by the latest plan."""
        exact = None if self.plan is None else self.plan.exact_steps
        return 1 if exact is None else exact[0] + 2

    def later(self, call: Call, number: int) -> Callable[[nn.Module], Any]:
        """The call of a later step: like `call`, at a smaller timestep. It is made on the module that is given to it.

        Args:
            number: of the step, from 0.
        """
        clock = next((each.clock for each in self._all() if each.plan is self.plan), None)
        tensors, numbers = list(call.tensors), dict(call.numbers)
        if clock is not None and (i := clock.timestep) is not None:
            whole = not tensors[i].is_floating_point()
            tensors[i] = (tensors[i] - number).clamp(min=0) if whole else tensors[i] * (1 - number / 100)
            if i in numbers:
                numbers[i] = tensors[i].item()
        call = replace(call, numbers=numbers)
        return lambda module: call.run(module, call.rebuild(call.with_numbers(tensors)))

    @property
    def signatures(self) -> int:
        """The number of programs kept."""
        return sum(map(len, self._entries.values()))

    @property
    def compiled(self) -> list[Report]:
        """Compilation reports of the programs kept, for this process's rank."""
        return [report for entry in self._all() for report in entry.loaded.compiled]

    def _say_idle(self, generation: Generation) -> None:
        """Warn once of a generation without displaced steps, when it ends."""
        why = "" if self._said_idle else generation.idle()
        if why:
            self._said_idle = True
            warn(
                f"{type(self.model).__name__}: no step of this generation was displaced, so it was as fast as with "
                f"strategy='sync' (the steps were exact because {why})"
            )

    def _device(self, *arguments: Any) -> torch.device:
        """The device of a call, from its tensors and the first parameter."""
        leaves = [*leaves_of(*arguments), next(self.model.parameters(), None)]
        return device_of([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def _found(
        self, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None, gradients: bool
    ) -> tuple[Call, Entry] | None:
        """A call with its program; None if it is of a method, and has to run unsplit."""
        call = None
        try:
            call = Call.of(self.model, args, kwargs, method)
            if gradients:
                call.refuse_gradients()
            self._update()
            structure = self._unsplit_structure
            if structure is not None and not structure.untouched() and not structure.refresh():
                self._unsplit.clear()
            # an argument that is perhaps not read, like a generator of random numbers, makes no difference here
            if any(call.key == key or call.differs(key) for key in self._unsplit):
                return None
            entry = self._entry(call)
            check_memory(entry.captured, self.model, call)
            return call, entry
        except UNSPLIT as error:
            if method is None or method.most is None or self.strict:
                raise
            if call is not None:
                self._unsplit.add(call.key)
            self._say_unsplit(method, str(error))
            return None

    def _must_be_plain(self, method: Method, gradients: bool, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a method that may run unsplit has to: nothing here trains, or computes gradients."""
        if method.most is None or self.strict or self._closed:
            return False
        if not gradients:
            return False
        if self.model.training:
            self._say_unsplit(method, "the model is in training mode (call model.eval() before)")
            return True
        if not any(isinstance(each, Tensor) and each.requires_grad for each in leaves_of(args, kwargs)):
            return False
        self._say_unsplit(method, "an input requires a gradient")
        return True

    def _run_unsplit(self, method: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = method.function(*args, **kwargs)
        if self._unsplit_structure is None:  # the first run may leave attributes behind, as later ones do
            self._unsplit_structure = Structure(self.model, hooks=False)
        return result

    def _say_unsplit(self, method: Method, why: str) -> None:
        warn(f"{type(self.model).__name__}.{method.name} runs unsplit on every rank: {why}")

    def _update(self) -> None:
        """Forget all programs if the structure of the model has changed since they were captured."""
        if self._structure is not None and not self._structure.untouched():
            if self._structure.refresh():
                for entry in self._all():
                    entry.weights = WeightTable(self.model, list(entry.plan.program.weights.values()))
            else:
                self._forget()

    def _entry(self, call: Call) -> Entry:
        if hash(call.key) in self._evicted and not self._hinted:
            self._hinted = True
            warn(
                f"{type(self.model).__name__} is captured again for a kind of call that it was captured for before: "
                f"only the programs of the {SIGNATURES} latest kinds (shapes, options) are kept; make all calls of one "
                "kind before those of the next, or bring the inputs to fewer shapes"
            )
        call = self._unread.reduced(call, self._entries)
        entries = self._entries.setdefault(call.key, [])
        self._entries.move_to_end(call.key)
        for entry in [entry for entry in entries if outdated(entry.captured, self.model)]:
            entries.remove(entry)
            entry.loaded.release()
        broken = None
        for entry in entries:
            broken = broken_guard(entry.captured, self.model, call.tensors)
            if broken is None:
                entries.remove(entry)
                entries.append(entry)  # ordered from least to most recently used
                self._in_a_row = 0
                return entry
        if broken is not None and len(entries) >= GUARDED:
            if self._in_a_row >= GUARDED:
                raise guard_error(broken)
            entries.pop(0).loaded.release()
        self._in_a_row += 1
        try:
            return self._capture(call, entries)
        except CaptureError:
            if not call.unread:
                raise
            while entries:
                entries.pop().loaded.release()
            return self._entry(self._unread.refute(call))
        finally:
            if entries:
                self._entries[call.key] = entries
            else:
                self._entries.pop(call.key, None)

    def _capture(self, call: Call, entries: list[Entry]) -> Entry:
        with torch.inference_mode(False), self._capturing(self.model):
            program = capture_call(self.model, call)
        plan = self._planner(program)
        table = WeightTable(self.model, list(plan.program.weights.values()))
        while self.signatures >= SIGNATURES:
            self._evict()
        loaded = self.executor.load(plan, table.tensors(), call.tensors)
        exact = plan.exact_steps
        clock = None if exact is None else Clock.of(plan.program, *exact)
        if clock is not None and clock.timestep is None:
            names = ", ".join(program.input_paths)
            warn(
                f"{type(self.model).__name__} has no input that is known to be a timestep (its inputs: {names}), so "
                "its steps cannot be told apart: all of them are exact"
            )
        entry = Entry(program, plan, loaded, table, clock, hooks=call.method is None)
        entries.append(entry)
        known = [*self._all(), entry]
        changes = [change for each in known for change in each.captured.changes]
        self._structure = Structure(self.model, changes, hooks=any(each.hooks for each in known))
        return entry

    def _all(self) -> list[Entry]:
        return [entry for entries in self._entries.values() for entry in entries]

    def _evict(self) -> None:
        key = next(key for key, entries in self._entries.items() if entries)
        self._entries[key].pop(0).loaded.release()
        if not self._entries[key]:
            del self._entries[key]
            self._evicted.add(hash(key))

    def _forget(self) -> None:
        for entry in self._all():
            entry.loaded.release()
        self._entries.clear()
        self._evicted.clear()
        self._structure = None


def leaves_of(*arguments: Any) -> list[Any]:
    return pytree.tree_leaves(arguments)


def _question(clock: Clock | None, tensors: Sequence[Tensor], generation: Generation) -> Question:
    """How to run a call: what a clock decides, or an exact step."""
    number, call = generation.number, generation.calls if generation.announced else 0
    if clock is None:
        return Question((), lambda _: EXACT, number, call)
    decide = lambda values: clock.step(tensors, generation, values)  # noqa: E731
    return Question(clock.facts(tensors, generation), decide, number, call, clock.digest(generation))
