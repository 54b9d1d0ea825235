"""Calls that run at once: as many as there are groups of ranks, each on a group of its own.

Guidance that calls the model once for each branch gives no batch that could be divided. So a call of one branch waits:
it returns deferred tensors, and runs together with the calls of the other branches, or when its result is used. The
inputs of all are stacked, and each group takes those of its call. Where a call must run before the others have come,
all groups run that call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...capture import Call, written
from ...capture.sharing import sharing
from .deferred import Source
from .entry import Entry
from .generation import Generation

CHANGED = (
    "the model's tensors were changed before it was used, and it waited for the other guidance branch until then; use "
    "the result before, or call fxpass.parallelize with cfg=1"
)
#: runs a step: (weights, stacked inputs, generation, number of calls) -> stacked outputs
Run = Callable[[Sequence[Tensor], Sequence[Tensor], Generation, int], Sequence[Tensor]]
GENERATIONS = 4  #: that have calls which wait, at most


class Together:
    """Calls of one program and one generation that wait for each other.

    Writes through `.data`, and any to inference tensors, are not noticed.

    Args:
        entry: has the plan that runs several calls at once.
        weights: the tensors of the model now, which the calls are to be computed with.
    """

    def __init__(self, entry: Entry, weights: Sequence[Tensor], generation: Generation, run: Run) -> None:
        self.entry = entry
        self.count = entry.plan.calls
        self.generation = generation
        self.ended = False
        self.weights = list(weights)
        self._places = places(weights)
        self._run = run
        self.inputs: list[Tensor] = []  #: stacked: [count, *shape]
        self._sources: list[Source] = []  #: of the calls that wait

    def fits(self, other: Together) -> bool:
        """Whether calls with the other's program and weights can run together with those that wait."""
        return self.entry is other.entry and self._places == other._places

    def add(self, call: Call, compute: Callable[[], None]) -> Sequence[Tensor]:
        """Add a call; returns its results, deferred unless it is the last one.

        The inputs are copied: the caller may change them before the calls run.

        Args:
            compute: runs the calls, when the result of one that waits is used.
        """
        place = len(self._sources)
        if not place:
            with torch.inference_mode(False):
                self.inputs = [x.new_empty((self.count, *x.shape)) for x in call.tensors]
        for x, stacked in zip(call.tensors, self.inputs, strict=True):
            stacked[place].copy_(x)
        if place + 1 == self.count:
            return self._ran(place + 1)[place]
        self._sources.append(Source(compute))
        return self._sources[-1].results(self._like())

    def run(self) -> None:
        """Run the calls that wait, although not all have come.

        Raises:
            RankError: another rank failed. The results have the error, too.
        """
        count = len(self._sources)
        for stacked in self.inputs:
            stacked[count:].copy_(stacked[:1].expand_as(stacked[count:]))
        if places(self.weights) == self._places and not written(self.entry.captured):
            self._ran(count)
        else:
            self.fail(RuntimeError(CHANGED))

    def _like(self) -> list[Tensor]:
        """Tensors without data like the results of a call."""
        (output,) = self.entry.plan.program.graph.find_nodes(op="output")
        return [node.meta["val"] for node in output.args[0]]

    def _ran(self, count: int) -> list[list[Tensor]]:
        """The results of the first `count` calls; those that wait are given theirs."""
        self.ended = True
        try:
            outputs = self._run(self.weights, self.inputs, self.generation, count)
        except BaseException as error:
            self.fail(error)
            raise
        shared = self.entry.plan.program.shared
        results = [sharing(shared, [each[place] for each in outputs]) for place in range(count)]
        for source, own in zip(self._sources, results, strict=False):
            source.give(own)
        return results

    def fail(self, error: BaseException) -> None:
        """Tell all that waits why there are no results."""
        self.ended = True
        for source in self._sources:
            source.fail(error)


def places(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The address and the version of each weight."""
    return [(each.data_ptr(), -1 if each.is_inference() else each._version) for each in weights]


class Waiting:
    """The calls of an engine that wait, of several generations."""

    def __init__(self) -> None:
        self._all: list[Together] = []  #: of a generation each, the oldest first

    def add(self, call: Call, new: Together, use: Callable[[Together], None]) -> Sequence[Tensor]:
        """The outputs of a call; deferred if it has to wait for others.

        Args:
            new: takes the call, unless others wait that it fits.
            use: runs the calls that wait, when a deferred output is used.
        """
        for each in [each for each in self._all if each.generation.ended]:
            self.run(each, early=False)
        together = next((each for each in self._all if each.generation is new.generation), None)
        if together is not None and not together.fits(new):
            self.run(together, early=True)
            together = None
        if together is None:
            together = new
            self._all.append(new)
            if len(self._all) > GENERATIONS:
                self.run(self._all[0], early=False)
        try:
            return together.add(call, lambda: use(together))
        finally:
            if together.ended:
                self._all.remove(together)

    def run(self, together: Together, *, early: bool) -> None:
        """Run calls that wait, unless they have run.

        Args:
            early: the next call of their generation comes too late, or is another: from now on each runs by itself.
        """
        if together in self._all:
            self._all.remove(together)
            together.run()
            together.generation.apart = together.generation.apart or early  # not if a rank disagrees or has failed

    def complete(self, entry: Entry | None = None) -> None:
        """Run all calls that wait, or those of one entry. If one fails, none of the others is run."""
        try:
            for each in list(self._all):
                if entry in (None, each.entry):
                    self.run(each, early=False)
        except BaseException as error:
            self.fail(str(error) or type(error).__name__)
            raise

    def fail(self, why: str) -> None:
        """Give up the calls that wait: whoever uses their results hears why."""
        waiting, self._all = self._all, []
        for each in waiting:
            each.fail(RuntimeError(why))
