"""What calls of a module that a loop repeats leave in their arguments stays on the ranks, as rows, for the next calls.

A decoder of videos keeps values of earlier frames in a list, or returns them beside its result. Only the next call of
the same module reads them, so each rank keeps its own rows, and the caller gets deferred tensors: a later call finds
out from these what to take. Any other use gathers the rows first; all ranks must make the same use.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...capture import Call
from ...capture.call import empty_like
from ...ir.layout import Layout
from ...ir.mesh import Placement
from ...ir.program import Program, fingerprint, layout_of
from ...passes.normalize import memory_of_their_own
from ...passes.partition import partition
from ...passes.rules import RULES
from ...passes.schedule import schedule
from ..executor import Loaded, Question
from ..held import Holding
from .deferred import METADATA, DeferredTensor, Source, plain
from .engine import Engine
from .entry import Entry, question_of
from .generation import Generation
from .programs import SIGNATURES

_numbers = itertools.count()  #: one for each value that ranks keep, of all engines


def kept_outputs(program: Program) -> tuple[int, ...]:
    """The outputs of a captured program that ranks may keep.

    These are what it puts into its arguments, or returns in a dict or list that is part of a tuple (a result, and a new
    cache), in memory of its own.
    """
    if any(change.held is not None for change in program.changes):
        return ()
    result, changes = pytree.tree_unflatten(list(range(len(program.out_leaves))), program.out_spec)
    beside = [part for part in result if isinstance(part, (dict, list))] if isinstance(result, tuple) else []
    keep = set(pytree.tree_leaves((beside, changes)))
    outputs = [i for i, leaf in enumerate(program.out_leaves) if leaf is ...]
    return tuple(i for i in memory_of_their_own(program) if i < len(outputs) and outputs[i] in keep)


class Kept(Source):
    """A value of which each rank keeps its rows; the whole value is contiguous.

    Args:
        like: a tensor without data, of the shape, dtype and device of the whole value.
        gather: gives it its whole value.

    Attributes:
        number: by which this process's executors know it.
        order: the same on all ranks: how many the engine has made before.
    """

    metadata = METADATA | {Tensor.stride}

    def __init__(self, engine: KeepingEngine, layout: Layout, like: Tensor, gather: Callable[[Kept], None]) -> None:
        this = weakref.proxy(self)  # no reference cycle: ranks forget the rows when nobody refers to them
        super().__init__(lambda: gather(this))
        self.engine, self.layout, self.like = engine, layout, like
        self.number, self.order = next(_numbers), next(engine.orders)


@dataclass(frozen=True, eq=False)
class GatheringPlan:
    """Gathers a value of which each rank has its rows."""

    program: Program
    graph: fx.Graph
    world_size: int
    fingerprint: str
    exact_steps: None = None
    calls: int = 1

    @property
    def placement(self) -> Placement:
        return Placement.one_each(self.world_size)

    @staticmethod
    def of(like: Tensor, layout: Layout, world: int) -> GatheringPlan:
        """
        Args:
            like: a tensor of the shape, dtype and device of the whole value.
        """
        graph = fx.Graph()
        node = graph.placeholder("rows")
        node.meta = {"val": like, "shape": tuple(like.shape), "dtype": like.dtype, "given": layout}
        graph.output((node,))
        spec = pytree.tree_structure([0])
        program = Program(graph, {}, {}, ("rows",), ("rows",), spec, (...,), given={"rows": layout})
        lowered = schedule(partition(graph, world, {}, RULES))
        return GatheringPlan(program, lowered, world, fingerprint(lowered))


class KeepingEngine(Engine):
    """An engine whose calls leave rows on the ranks: what they put into their arguments, where it is split."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._unused: deque[int] = deque()  #: numbers of what nobody refers to any more
        self._living: set[int] = set()  #: of what ranks keep
        self._gathering: dict[Any, Loaded] = {}  #: by the kind of value, the least recently used first
        self.orders = itertools.count()

    def forget_unused(self) -> None:
        """Free the rows that nobody refers to any more; this thread has the turn."""
        if numbers := [self._unused.popleft() for _ in range(len(self._unused))]:
            self.executor.forget(numbers)
            self._living.difference_update(numbers)

    def _release(self) -> None:
        super()._release()
        for loaded in self._gathering.values():
            loaded.release()
        self._gathering.clear()
        self.executor.forget(sorted(self._living))
        self._living.clear()

    def _lies(self, leaf: Any) -> bool:
        """Whether an argument is a value whose rows the ranks have."""
        here = isinstance(leaf, DeferredTensor) and isinstance(leaf.source, Kept) and leaf.source.engine is self
        return here and leaf.step is None and leaf.value is None and leaf.error is None

    def _compute(self, arguments: Sequence[Any]) -> None:
        plain([each for each in arguments if not self._lies(each)])

    def _bound(self, call: Call) -> Call:
        layouts = {i: each.source.layout for i, each in enumerate(call.tensors) if self._lies(each)}
        tensors = tuple(each if i in layouts else plain(each) for i, each in enumerate(call.tensors))
        return replace(call, tensors=tensors).given_as(layouts) if layouts else super()._bound(call)

    def _run(
        self, entry: Entry, weights: Sequence[Tensor], inputs: Sequence[Tensor], generation: Generation, calls: int = 1
    ) -> list[Tensor]:
        self.forget_unused()
        lying: dict[int, Any] = {i: each for i, each in enumerate(inputs) if isinstance(each, DeferredTensor)}
        own = [empty_like(each) if i in lying else each for i, each in enumerate(inputs)]
        new = self._new(entry)
        takes = {i: each.source for i, each in lying.items()}
        question = question_of(entry.clock, own, generation)
        outputs = _step(entry.loaded, weights, own, question, takes, new)
        for i, kept in new.items():
            (outputs[i],) = kept.results([kept.like])
        return outputs

    def _new(self, entry: Entry) -> dict[int, Kept]:
        """What ranks keep of the outputs of a call, by index."""
        graphs = entry.plan.program.graph, entry.plan.graph
        whole, parts = (graph.find_nodes(op="output")[0].args[0] for graph in graphs)
        new: dict[int, Kept] = {}
        for i, (node, part) in enumerate(zip(whole, parts, strict=True)):
            if layout_of(part).split:
                new[i] = kept = Kept(self, layout_of(part), node.meta["val"], self._gather)
                weakref.finalize(kept, self._unused.append, kept.number)
                self._living.add(kept.number)
        return new

    def _gather(self, kept: Kept) -> None:
        """Give a value to the tensors that are deferred because of it."""
        inside = self.turn.holder == get_ident()
        with nullcontext() if inside else self.turn.taken(), torch.no_grad():
            if kept.run is None:
                return  # another thread was faster
            if self.ended:
                raise RuntimeError(
                    f"a value that a call has left on the ranks cannot be gathered any more ({self.ended}); use it "
                    "before the module is closed"
                )
            like = kept.like
            with self._failing():
                if not inside:
                    self.executor.begin(like.device)
                rows = [empty_like(like)]
                kind = (tuple(like.shape), like.dtype, like.device, kept.layout)
                loaded = self._gathering.pop(kind, None)
                if loaded is None:
                    plan = GatheringPlan.of(like, kept.layout, self.executor.world_size)
                    loaded = self.executor.load(plan, [], rows)
                self._gathering[kind] = loaded
                while len(self._gathering) > SIGNATURES:
                    self._gathering.pop(next(iter(self._gathering))).release()
                found = _step(loaded, [], rows, question_of(None, rows, self._generations.current()), {0: kept}, {})
            kept.give([each.contiguous() for each in found])


def _step(
    loaded: Loaded,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    question: Question,
    takes: Mapping[int, Kept],
    keeps: Mapping[int, Kept],
) -> list[Tensor]:
    """The flat outputs of a step, in which all ranks must take the same values."""
    orders = repr({i: each.order for i, each in takes.items()})
    taken = int.from_bytes(hashlib.sha256(orders.encode()).digest()[:6])
    step = loaded.decide(inputs, replace(question, taken=taken))
    numbers = ({i: each.number for i, each in values.items()} for values in (takes, keeps))
    return loaded.run(weights, inputs, step, Holding(*numbers))
