"""From a call to its program: capture once per signature, plan, run; the same for all executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...capture import (
    Call,
    CaptureError,
    DrawingCall,
    Draws,
    DrawsError,
    GuardError,
    Method,
    OtherDrawsError,
    TooManyOperatorsError,
    arranged,
    check_memory,
    returned,
)
from ...capture.structure import Structure
from ...ir.advice import warn
from ...passes.limits import WorldSizeError
from ..errors import DisagreementError
from ..executor import Executor, PlanLike, Report, device_of
from .deferred import DeferredTensor, plain
from .entry import Entry, question_of
from .generation import Generation, Generations
from .programs import Planner, Programs
from .together import Together, Waiting
from .turn import Turn

if TYPE_CHECKING:
    from .feeds import Feeder, Joints
    from .loops import Loops

APART = object()  #: instead of a result: the call runs by itself
UNSPLIT = (CaptureError, GuardError, WorldSizeError)  #: errors after which a call of a method runs unsplit


class Engine:
    """Runs calls of `model` and of its methods on the ranks of `executor`, one after the other.

    A call of `model` itself is split or refused. A call of another method that cannot be split runs unsplit on every
    rank, and a warning says why; with `strict` it is refused, too.
    """

    joined = False  #: whether the model is made of several parts of a pipeline

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        executor: Executor,
        *,
        strict: bool = False,
        turn: Turn | None = None,
        capturing: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext,
        apart: Planner | None = None,
    ) -> None:
        """
        Args:
            apart: plans calls one by one, where those of the planner's plans do not come together.
            capturing: given the model, what it is captured in: a context that changes options of it, and back.
            turn: of all engines whose executors share processes; default: its own.
        """
        self.model = model
        self.executor = executor
        self.strict = strict
        self.plan: PlanLike | None = None
        self._apart = apart or planner
        self._waiting = Waiting()
        self.planner = planner
        self.programs = Programs(model, planner, executor, self._waiting.complete, capturing)
        self.feeder: Feeder | None = None  #: lets calls wait for a denoiser that takes their results
        self.joints: Joints | None = None  #: runs calls together with a part whose results they take
        self.loops: Loops | None = None  #: runs the repeated calls of methods that are too long to be split
        self._draws = Draws()
        self._unsplit: set[Any] = set()  # keys of calls that cannot be split
        self._unsplit_structure: Structure | None = None  # of the model after the first of them
        self.turn = turn or Turn()
        self._closed: str | None = None
        self._calling = RLock()  # held by the thread that makes a call: a method may call itself, or another one
        self.before_call: list[Callable[[], None]] = []  #: each finds generations that nobody has announced yet
        self.calls = 0  #: how many calls were begun
        self._generations = Generations()
        self._said_idle = False  # whether the warning about steps that are all exact was given

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None = None) -> Any:
        """The output of the model, or of one of its methods. Runs without autograd.

        Raises:
            RuntimeError: the module was closed, or gradients are enabled and the model is in training mode or an input
                requires one.
            CaptureError: the model cannot be captured.
            GuardError: it turns an input that differs at every call into a Python number.
            RankError: another rank failed.
        """
        with self._calling:  # a loop in Python has not the turn, and what is attached meanwhile looks like a change
            return self._called(args, kwargs, method)

    def _called(self, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None) -> Any:
        for each in list(self.before_call):
            each()
        self.calls += 1
        gradients = torch.is_grad_enabled()
        if method is not None and self._must_be_plain(method, gradients, args, kwargs):
            return method.function(*args, **kwargs)
        if self.joints is not None and (joined := self.joints.run(self, args, kwargs, method)) is not APART:
            return joined
        self._compute(leaves_of(args, kwargs))  # this thread must not have the turn
        with self.turn.taken(), torch.no_grad():
            if self._closed:
                raise RuntimeError(f"this parallel module was closed ({self._closed}); call fxpass.parallelize again")
            if self.model.training and gradients:
                raise RuntimeError(
                    "the model is in training mode and gradients are enabled; fxpass runs inference only: call "
                    "model.eval() first, or call it under torch.no_grad()"
                )
            with self._failing():
                self.executor.begin(self._device(args, kwargs))
                found = self._found(args, kwargs, method, gradients)
                if found is None and self.loops is None:
                    return self._marked(self._run_unsplit(method, args, kwargs))
                finish = None if found is None else self._started(*found)
            if finish is not None:
                return finish()
        with torch.no_grad(), self._failing():  # without the turn, which the calls of its loops take
            return self._marked(self._run_unsplit(method, args, kwargs))

    def _started(self, call: Call, entry: Entry, waits: bool) -> Callable[[], Any]:
        """Run a call on all ranks, unless it waits for others; returns what gives its result to the caller."""
        generation = self._generations.current()
        if waits and self.feeder is not None:
            result = self.feeder.defer(self, call, entry, generation)
            return lambda: result
        self.plan, weights = entry.plan, entry.weights.tensors()
        program = entry.plan.program
        if entry.plan.calls > 1:
            new = Together(entry, weights, generation, partial(self._run, entry))
            outputs = self._waiting.add(call, new, self._use)
            return lambda: arranged(program, iter(outputs), call)[0]
        outputs = self._run(entry, weights, call.tensors, generation)
        return lambda: self._marked(returned(program, outputs, call))

    def _marked(self, result: Any) -> Any:
        """A result; of a part that feeds a denoiser, such that the denoiser's engine knows where it comes from."""
        return result if self.feeder is None else self.feeder.marked(result)

    def _run(
        self, entry: Entry, weights: Sequence[Tensor], inputs: Sequence[Tensor], generation: Generation, calls: int = 1
    ) -> list[Tensor]:
        """The flat outputs of a step.

        Args:
            calls: how many calls have come that the step runs at once.
        """
        generation.calls += 1
        question = replace(question_of(entry.clock, inputs, generation), together=calls)
        step = entry.loaded.decide(inputs, question)
        self._say_idle(generation)
        return entry.loaded.run(weights, inputs, step)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """If the body raises, no later call reads what it has left, and the other ranks hear of it."""
        try:
            yield
        except BaseException as error:
            for each in self.programs.all():
                if each.clock and isinstance(error, DisagreementError):
                    each.clock.forget()
                elif each.clock:  # some exchanges may already have sent this step's values
                    each.clock.restart()
            self.executor.failed(error)
            raise

    # -- calls that run together ----------------------------------------------------------------------------------

    def _use(self, together: Together) -> None:
        """Run calls that wait, because a result is used."""
        inside = self.turn.holder == get_ident()
        with nullcontext() if inside else self.turn.taken(), torch.no_grad(), self._failing():
            if not inside:
                self.executor.begin(self._device(together.inputs))
            self._waiting.run(together, early=True)

    def complete(self) -> None:
        """Run the calls that wait as if the others had come."""
        with self.turn.taken(), torch.no_grad(), self._failing():
            self._waiting.complete()

    def _alone(self, entry: Entry, call: Call) -> Entry:
        """The entry with a plan for one call; the same one if there is no such plan."""
        if entry.alone is None:
            try:
                plan = self._apart(entry.captured)
            except WorldSizeError:
                entry.alone = entry
                return entry
            warn(
                f"{type(self.model).__name__}: {entry.plan.calls} calls that could run at once did not come one after "
                "the other (the result of one was used before the next, or the next has other shapes), so until this "
                f"generation ends all {self.executor.world_size} ranks work on patches of each call; batched guidance "
                "would be divided"
            )
            alone = Entry(entry.captured, entry.hooks)
            self.programs.load(alone, plan, call)
            entry.alone = alone
        return entry.alone

    def reset(self, timesteps: Sequence[float] = ()) -> None:
        """Begin a generation in this thread, with its timesteps if they are known: no earlier state is read."""
        with self.turn.taken():
            self._generations.begin(timesteps)

    def generation(self, timesteps: Sequence[float] = ()) -> Generation:
        """A generation of this module, to be entered."""
        return self._generations.new(timesteps)

    def give_up(self, why: str) -> None:
        """Give up calls that wait for others: their results are errors. The other ranks may take no further part."""
        with self.turn.taken(ending=True):
            self._waiting.fail(why)
            for each in (self.joints, self.feeder):
                if each is not None:
                    each.give_up(why)

    def close(self, why: str = "close() was called") -> None:
        """Release everything on all ranks; later calls raise."""
        if self.loops is not None:
            self.loops.close()
        with self.turn.taken(ending=True):
            if not self._closed:
                self._closed = why
                try:
                    self._release()
                    for each in (self.joints, self.feeder):
                        if each is not None:
                            each.close()
                finally:
                    self.programs.clear()
                    self.executor.close()

    def _release(self) -> None:
        """Run the calls that wait, and release all that is loaded on the ranks; this thread has the turn."""
        with suppress(Exception), torch.no_grad(), self._failing():  # whoever uses a result that has failed hears of it
            self._waiting.complete()
        self.programs.forget()

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
        clock = next((each.clock for each in self.programs.all() if each.planned and each.plan is self.plan), None)
        tensors, numbers = list(call.tensors), dict(call.numbers)
        if clock is not None and (i := clock.timestep) is not None:
            whole = not tensors[i].is_floating_point()
            tensors[i] = (tensors[i] - number).clamp(min=0) if whole else tensors[i] * (1 - number / 100)
            if i in numbers:
                numbers[i] = tensors[i].item()
        call = replace(call, numbers=numbers)
        return lambda module: call.run(module, call.rebuild(call.with_numbers(tensors)))

    @property
    def compiled(self) -> list[Report]:
        """Compilation reports of the programs kept, for this process's rank."""
        own = [report for entry in self.programs.all() if entry.planned for report in entry.loaded.compiled]
        return own + [report for joint in self.joints or () for report in joint.compiled]

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
        self, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None, gradients: bool, *, last: bool = True
    ) -> tuple[Call, Entry, bool] | None:
        """A call with its program, and whether it waits for a denoiser; None if it has to run unsplit.

        Args:
            last: if it draws other random numbers than were drawn for it, it runs unsplit; else this raises.
        """
        call = None
        try:
            if drawing := self._draws.drawn(self.model, args, kwargs, method):
                with suppress(OtherDrawsError):
                    return self._found_with(drawing, gradients, last=False)
                if drawing := self._draws.observed(self.model, args, kwargs, method):
                    return self._found_with(drawing, gradients)
            call = Call.of(self.model, args, kwargs, method)
            call = self._bound(call)
            if gradients:
                call.refuse_gradients()
            self.programs.update()
            structure = self._unsplit_structure
            if structure is not None and not structure.untouched() and not structure.refresh():
                self._unsplit.clear()
            # an argument that is perhaps not read, like a generator of random numbers, makes no difference here
            if any(call.key == key or call.differs(key) for key in self._unsplit):
                return None
            feeder = self.feeder
            waits = feeder is not None and feeder.may_wait(self, call, self._generations.current())
            try:
                entry = self.programs.entry(call, planned=feeder is None)
            except DrawsError:
                if drawing := self._draws.observed(self.model, args, kwargs, method):
                    return self._found_with(drawing, gradients)
                raise
            waits = waits and feeder is not None and feeder.fits(entry)
            if not waits and not entry.planned:
                plan = self.planner(entry.captured)
                # the denoiser needs the results at once: there is no time to wait for another call
                self.programs.load(entry, plan if plan.calls == 1 else self._apart(entry.captured), call)
            if not waits and entry.plan.calls > 1 and self._generations.current().apart:
                entry = self._alone(entry, call)
            check_memory(entry.captured, self.model, call.apart())
            return call, entry, waits
        except UNSPLIT as error:
            if isinstance(error, OtherDrawsError) and not last:
                raise
            if method is None or method.most is None or self.strict:
                raise
            if call is not None:
                self._unsplit.add(call.key)
            if isinstance(error, TooManyOperatorsError) and error.repeated:
                self._break_up(method, error.repeated)
            else:
                self._say_unsplit(method, str(error))
            return None

    def _compute(self, arguments: Sequence[Any]) -> None:
        """Compute arguments that are deferred."""
        plain(arguments)

    def _bound(self, call: Call) -> Call:
        """A call as it is captured, of one whose arguments may be deferred."""
        fed = [i for i, each in enumerate(call.tensors) if isinstance(each, DeferredTensor) and each.source.fed]
        return replace(call, tensors=plain(call.tensors), joined=self.joined).fed_with(fed)

    def _break_up(self, method: Method, paths: Sequence[str]) -> None:
        """Let the modules that a method repeats run on all ranks, each call by itself."""
        from .loops import Loops  # made of engines

        self.loops = self.loops or Loops(self)
        self.loops.add(paths, method.name)

    def _found_with(
        self, drawing: DrawingCall, gradients: bool, *, last: bool = True
    ) -> tuple[Call, Entry, bool] | None:
        """As `_found`, of a call whose random numbers have been drawn; they are given back if it runs unsplit."""
        found = None
        try:
            found = self._found(drawing.args, drawing.kwargs, drawing.method, gradients, last=last)
        finally:
            if found is None:
                drawing.give_back()
        return found

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

    def _run_unsplit(self, method: Method | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        assert method is not None
        with nullcontext() if self.loops is None else self.loops.attached():
            result = method.function(*args, **kwargs)
        if self._unsplit_structure is None:  # the first run may leave attributes behind, as later ones do
            self._unsplit_structure = Structure(self.model, hooks=False)
        return result

    def _say_unsplit(self, method: Method, why: str) -> None:
        warn(f"{type(self.model).__name__}.{method.name} runs unsplit on every rank: {why}")


def leaves_of(*arguments: Any) -> list[Any]:
    return pytree.tree_leaves(arguments)
