"""A part of a pipeline that feeds a denoiser runs in one program with it (`joint.py`).

A call of such a part waits: it returns deferred tensors. What the pipeline does with them before it gives them to the
denoiser (scale, add, concatenate, cast) is recorded. The denoiser's call runs everything at once. Every other use of a
result runs the part alone and unsplit, in this process only: ranks need not do the same with results.

Which calls wait depends on calls alone, which all ranks make alike. A part whose results a denoiser took twice, or that
cannot run in one program with it, never waits again; one whose results no denoiser took waits again in the next
generation.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...capture import Call, Method, arranged, autocast, bind, outdated, unsplit
from ...capture.guards import version
from .deferred import DEFERRED, DeferredTensor, Source, plain
from .engine import APART, UNSPLIT, Engine
from .entry import Entry
from .generation import Generation
from .joint import Joint, Recipe, write
from .programs import GUARDED, NoPlanError
from .together import places

log = logging.getLogger("fxpass")

CHANGED = (
    "the module was changed (its tensors, an adapter, an attribute) between its call and the call of the denoiser that "
    "takes its results; change it before or after both calls"
)
#: functions that combine tensors and numbers
COMBINING = frozenset(
    {
        *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.neg, Tensor.__rsub__, Tensor.__rdiv__),
        *(torch.add, torch.sub, torch.subtract, torch.mul, torch.multiply, torch.div, torch.neg),
    }
)
_STATIC = (int, float, torch.dtype, torch.memory_format, type(None), type(...))
#: functions that also take tensors that are no results of a part
_WITH_TENSORS = COMBINING | {torch.cat, torch.concat, torch.stack}
#: functions of results of a part, whose own results are deferred
RECORDED = DEFERRED | _WITH_TENSORS | {torch.zeros_like, Tensor.to, Tensor.repeat}


class Residuals(Source):
    """What a part returns, and all that a pipeline makes of it before it gives it to a denoiser."""

    fed = True

    def takes(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether results of a function are deferred, also after the values of its arguments were computed."""
        if func not in RECORDED or "out" in kwargs:
            return False
        leaves = pytree.tree_leaves((args, kwargs))
        device = next(each.device for each in leaves if isinstance(each, DeferredTensor))

        def fits(leaf: Any) -> bool:
            if isinstance(leaf, DeferredTensor):
                return leaf.source is self and unwritten(leaf)
            if isinstance(leaf, Tensor):
                alike = not leaf.ndim or leaf.device == device
                return func in _WITH_TENSORS and type(leaf) is Tensor and alike and not leaf.requires_grad
            if isinstance(leaf, slice):
                return all(type(each) in (int, type(None)) for each in (leaf.start, leaf.stop, leaf.step))
            return isinstance(leaf, _STATIC)

        return all(map(fits, leaves))

    @staticmethod
    def of(result: Any) -> Any:
        """What a part has returned, as tensors that are known to be made anew for each step."""
        leaves, spec = pytree.tree_flatten(result)
        values = [each for each in leaves if isinstance(each, Tensor)]
        source = Residuals(lambda: None)
        made = iter(source.results(values))
        source.give(values)
        return pytree.tree_unflatten([next(made) if isinstance(each, Tensor) else each for each in leaves], spec)


class Feed(Residuals):
    """A call of a part, whose results a denoiser may take.

    The inputs are copied, because the caller may change them. Writes through `.data` are not noticed.

    Args:
        engine: of the part.
    """

    def __init__(self, engine: Engine, entry: Entry, call: Call, generation: Generation) -> None:
        this = weakref.proxy(self)  # no reference cycle: a feed ends with its results

        def run() -> None:
            this._compute()

        super().__init__(run)
        self.engine, self.entry, self.call, self.generation = engine, entry, call, generation
        self.joined = False  #: a denoiser has taken the results
        self._versions = [version(each) for each in call.tensors]
        self._changes = engine.programs.changes
        self._places = places(entry.weights.tensors())
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for each in call.tensors:
                copies.setdefault(id(each), each.clone())
        self._copies = [copies[id(each)] for each in call.tensors]

    def later(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Keep copies of what the caller may change."""
        args, kwargs = pytree.tree_map(lambda x: x.clone() if type(x) is Tensor else x, (args, kwargs))
        return super().later(func, args, kwargs)

    def unchanged(self) -> bool:
        """Whether the part is as it was at its call; this thread has the turn."""
        programs = self.engine.programs
        programs.update()
        if programs.changes != self._changes or outdated(self.entry.captured, self.engine.model):
            return False
        return places(self.entry.weights.tensors()) == self._places

    def arguments(self) -> dict[str, Any]:
        """The arguments of the call, by name. Tensors that nobody has written to since are the caller's own."""
        tensors = [
            copied if each.is_inference() or version(each) != seen else each
            for each, copied, seen in zip(self.call.tensors, self._copies, self._versions, strict=True)
        ]
        return self.call.rebuild(self.call.with_numbers(tensors))

    def leaves(self) -> list[int]:
        """For each tensor that the part returns, which leaf of its result it is."""
        return [place for place, leaf in enumerate(self.entry.captured.out_leaves) if leaf is ...]

    def _compute(self) -> None:
        """Run the part alone, unsplit."""
        turn, model = self.engine.turn, self.engine.model
        inside = turn.holder == get_ident()
        with nullcontext() if inside else turn.taken(), torch.inference_mode(False), torch.no_grad():
            if self.run is None:
                return  # another thread was faster
            if not self.unchanged():
                self.fail(RuntimeError(CHANGED))
                return
            try:
                with torch.autocast(self.call.tensors[0].device.type, enabled=False):
                    found = unsplit(model, replace(self.call, tensors=tuple(self._copies)), self.entry.captured)
            except BaseException as error:
                self.fail(error)
                raise
            self.give(found)


def unwritten(deferred: DeferredTensor) -> bool:
    """Whether a deferred tensor still is what its recipe makes: nobody has written to its value."""
    if deferred.error is not None:
        return False
    value = deferred.value
    return value is None or (not value.is_inference() and version(value) == deferred.version)


class Feeder:
    """Lets calls of a part wait for the denoiser."""

    def __init__(self) -> None:
        self.joints: weakref.WeakSet[Joints] = weakref.WeakSet()  #: of the denoisers that took results

    def may_wait(self, engine: Engine, call: Call, generation: Generation) -> bool:
        """Whether a call may wait, as far as is known before it was captured."""
        plain_call = _is_plain(engine, call.method) and not autocast()
        return plain_call and not generation.untaken and bool(call.tensors)

    def fits(self, entry: Entry) -> bool:
        """Whether calls of a program may wait: they only return tensors, and may run in one program with a denoiser."""
        program = entry.captured
        new = all(leaf is ... or leaf is None for leaf in program.out_leaves)
        return new and entry.feeds and not program.written and not program.changes

    def defer(self, engine: Engine, call: Call, entry: Entry, generation: Generation) -> Any:
        """What the part returns, with deferred tensors."""
        (output,) = entry.captured.graph.find_nodes(op="output")
        feed = Feed(engine, entry, call, generation)
        generation.untaken = True
        results = feed.results([node.meta["val"] for node in output.args[0]])
        return arranged(entry.captured, iter(results), call)[0]

    def marked(self, result: Any) -> Any:
        """What a call that did not wait returns."""
        return Residuals.of(result)

    def give_up(self, why: str) -> None:
        """Give up calls of a denoiser with the part that wait for others; this thread has the turn."""
        for joints in self.joints:
            joints.give_up(why, self)

    def close(self) -> None:
        """Release the programs in which the part runs with a denoiser; this thread has the turn."""
        for joints in self.joints:
            joints.release(self)


class JointEngine(Engine):
    """Runs calls of a denoiser with a part that feeds it; a call that cannot be split so returns `APART`.

    Of a call it takes the `Feed` by position, and the arguments of `Joint.forward` by name. It shares executor, turn
    and generations with the denoiser's own engine, which releases its programs.
    """

    joined = True

    def __init__(self, engine: Engine, part: Engine) -> None:
        super().__init__(
            Joint.of(engine.model, part.model),
            engine.planner,
            engine.executor,
            strict=engine.strict,
            turn=engine.turn,
            capturing=self._counted,
            apart=engine._apart,
        )
        self._generations = engine._generations
        self._released = False  # the denoiser or the part was closed
        self._recipe: Recipe | None = None  # of the call that has the turn
        # for each program of the part, the recipes that were captured since a call found a program
        self._captured: weakref.WeakKeyDictionary[Entry, set[Recipe]] = weakref.WeakKeyDictionary()
        self._new: set[Recipe] = set()  # those for the call that has the turn

    def _found(
        self, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None, gradients: bool, *, last: bool = True
    ) -> Any:
        if not args:  # the same call once more, with the random numbers that it draws among its arguments
            return super()._found(args, kwargs, method, gradients, last=last)
        if self._released:
            return None
        (feed,) = args
        self._recipe, self._new = kwargs["recipe"], self._captured.setdefault(feed.entry, set())
        try:
            found = super()._found((), kwargs, method, gradients)
        except (*UNSPLIT, NoPlanError) as error:
            _leave(feed, str(error))
            return None
        if not self.programs.in_a_row:  # no program was captured
            self._new.clear()
        return found

    @contextmanager
    def _counted(self, model: nn.Module) -> Iterator[None]:
        """Count the recipes that a program of the part is captured with.

        Raises:
            NoPlanError: there were too many in a row.
        """
        assert self._recipe is not None
        if len(self._new | {self._recipe}) > GUARDED:
            raise NoPlanError("a denoiser takes something else of its results at every call")
        self._new.add(self._recipe)
        yield

    def release(self) -> None:
        """Run the calls that wait, and release all programs; later calls return `APART`. This thread has the turn."""
        self._released = True
        self._release()

    def _run_unsplit(self, method: Method | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return APART


class Joints:
    """Runs calls of a denoiser that takes results of another part in one program with that part."""

    def __init__(self) -> None:
        self._engines: dict[Feeder, JointEngine] = {}  # one for each part

    def __iter__(self) -> Iterator[JointEngine]:
        return iter(list(self._engines.values()))

    def run(self, engine: Engine, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None) -> Any:
        """The result of a call of the denoiser; `APART` if it takes no results of a part, or runs by itself."""
        leaves = pytree.tree_leaves((args, kwargs))
        feeds = {each.source for each in leaves if isinstance(each, DeferredTensor) and isinstance(each.source, Feed)}
        if not feeds or not _is_plain(engine, method) or (engine.model.training and torch.is_grad_enabled()):
            return APART
        for feed in feeds:
            if feed.joined:
                _leave(feed, "a denoiser takes its results twice")
        if len(feeds) > 1 or autocast():
            return APART
        (feed,) = feeds
        if feed.joined or feed.engine.turn is not engine.turn:
            return APART
        arguments, positional = bind(engine.model.forward, args, kwargs)
        leaves, spec = pytree.tree_flatten(arguments)
        links = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, DeferredTensor)}
        links = {place: leaf for place, leaf in links.items() if leaf.source is feed}
        if not all(map(unwritten, links.values())):
            return APART
        with engine.turn.taken():
            if engine.ended or feed.engine.ended:
                return APART
            feed.joined, feed.generation.untaken = True, False
            if not feed.unchanged():
                if feed.run is not None:  # else the results were computed before
                    feed.fail(RuntimeError(CHANGED))
                return APART
            joint = self._joint(engine, feed.engine)
        leaves = [None if place in links else leaf for place, leaf in enumerate(leaves)]
        written = write(links, feed.leaves(), COMBINING, (positional, feed.call.positional))
        result = joint(
            (feed,),
            {
                "denoiser": pytree.tree_unflatten(plain(leaves), spec),
                "part": feed.arguments(),
                "recipe": written.recipe,
                "given": written.given,
            },
        )
        if result is not APART:
            engine.plan = feed.engine.plan = joint.plan
        return result

    def _joint(self, engine: Engine, part: Engine) -> JointEngine:
        """What runs a denoiser with a part; this thread has the turn."""
        feeder = part.feeder
        assert feeder is not None  # it has deferred the call
        if feeder not in self._engines:
            self._engines[feeder] = JointEngine(engine, part)
            feeder.joints.add(self)
        return self._engines[feeder]

    def give_up(self, why: str, feeder: Feeder | None = None) -> None:
        """Give up calls that wait for others, with one part or with any; this thread has the turn."""
        for each, joint in self._engines.items():
            if feeder in (None, each):
                joint._waiting.fail(why)

    def release(self, feeder: Feeder) -> None:
        """Release the programs of a part; this thread has the turn."""
        if (joint := self._engines.pop(feeder, None)) is not None:
            joint.release()

    def close(self) -> None:
        """Release all programs; this thread has the turn."""
        for feeder in list(self._engines):
            self.release(feeder)


def connect(denoisers: Iterable[Engine], parts: Iterable[Engine]) -> None:
    """Let parts run in one program with the denoisers that take their results."""
    for engine in denoisers:
        engine.joints = Joints()
    for engine in parts:
        engine.feeder = Feeder()


def _leave(feed: Feed, why: str) -> None:
    """Let no further call of a program wait."""
    if feed.entry.feeds:
        feed.entry.feeds = False
        log.info("%s runs in a program of its own from now on: %s", type(feed.engine.model).__name__, why)


def _is_plain(engine: Engine, method: Method | None) -> bool:
    """Whether a call runs the forward of the model's class, and nothing around it."""
    forward = type(engine.model).forward
    return method is not None and getattr(method.function, "__func__", None) is forward
