"""Generations: which calls of a module belong to one denoising loop, and so may read what earlier ones have left."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

MANY = 20  #: steps after which a generation whose end is not known has shown that none is displaced


class Generation:
    """One denoising loop. Its calls read the state of no other.

    A `with` block makes it the current one of this thread. It can be entered again, so that loops can take turns.

    Attributes:
        timesteps: those of the generation, in the scheduler's unit; empty if they are not known.
        announced: a pipeline, `reset` or `generation` said where it begins, so that timesteps may repeat in it.
        sure: somebody says which calls belong to it (`generation`), so that timesteps and samples tell nothing.
        ended: another one has begun in its place.
        number: how many were made before.
        calls: how many calls it has had.
        displaced: how many of them were displaced.
        reasons: for how many of the others each reason held.
        apart: a call had to run before those came that its plan runs together with it, so each runs by itself.
        untaken: the results of its last call wait for a denoiser that takes them.
        finished: the last of its timesteps was reached.
    """

    def __init__(
        self, owner: Generations, timesteps: Sequence[float] = (), *, announced: bool = False, sure: bool = False
    ) -> None:
        self.timesteps = timesteps
        self.announced = announced
        self.sure = sure
        self.ended = False
        self.number = owner.count()
        self.calls = 0
        self.displaced = 0
        self.reasons: Counter[str] = Counter()
        self.apart = False
        self.untaken = False
        self.finished = False
        self._owner = owner

    def count(self, why: str, *, last: bool) -> None:
        """Count a step.

        Args:
            why: the reason for which it is exact; empty if it is displaced.
            last: whether it is at the last timestep.
        """
        self.finished = self.finished or last
        if why:
            self.reasons[why] += 1
        else:
            self.displaced += 1

    def idle(self) -> str:
        """Why none of its steps was displaced, if there were enough to tell; empty otherwise."""
        steps = self.reasons.total()
        if self.displaced or not steps or not (self.finished or steps > MANY):
            return ""
        return "; ".join(f"{reason}: {count} of {steps}" for reason, count in self.reasons.most_common(3))

    def __enter__(self) -> Generation:
        self._owner.entered().append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.entered().pop()


class Generations:
    """The current generation of each thread."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._numbers = itertools.count()

    def count(self) -> int:
        """The next number."""
        return next(self._numbers)

    def current(self) -> Generation:
        """The innermost one entered, else the one announced last, else one of this thread's own."""
        entered = self.entered()
        if entered:
            return entered[-1]
        if not hasattr(self._here, "base"):
            self._here.base = Generation(self)
        return self._here.base

    def begin(self, timesteps: Sequence[float]) -> None:
        """A generation begins in this thread, in place of the last one that was announced."""
        if hasattr(self._here, "base"):
            self._here.base.ended = True
        self._here.base = Generation(self, timesteps, announced=True)

    def new(self, timesteps: Sequence[float]) -> Generation:
        """A generation to be entered."""
        return Generation(self, timesteps, announced=True, sure=True)

    def entered(self) -> list[Generation]:
        """Those that this thread has entered, the innermost last."""
        if not hasattr(self._here, "entered"):
            self._here.entered = []
        return self._here.entered
