"""A captured program with its plan, and how its calls run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...capture.structure import WeightTable
from ...ir.program import Program
from ...ir.step import EXACT
from ..executor import Loaded, PlanLike, Question
from .clock import Clock
from .generation import Generation


@dataclass(eq=False)
class Entry:
    """A captured program; with a plan, loaded by the executor, once one is needed."""

    captured: Program
    hooks: bool  #: whether it holds the hooks of the model itself
    weights: WeightTable = field(init=False)  #: of the plan's program, or of the captured one as long as there is none
    planned: bool = False  #: whether it has what follows
    plan: PlanLike = field(init=False)
    loaded: Loaded = field(init=False)
    clock: Clock | None = None  #: None if every step is exact
    alone: Entry | None = None  #: the same with a plan for one call, where its own runs several; itself if none exists
    feeds: bool = True  #: its calls may wait for a denoiser that takes their results

    def look_up(self, model: nn.Module) -> None:
        """Find the weights in the model."""
        program = self.plan.program if self.planned else self.captured
        self.weights = WeightTable(model, list(program.weights.values()))


def question_of(clock: Clock | None, tensors: Sequence[Tensor], generation: Generation) -> Question:
    """How to run a call: what a clock decides, or an exact step."""
    number, call = generation.number, generation.calls if generation.announced else 0
    if clock is None:
        return Question((), lambda _: EXACT, number, call)
    decide = lambda values: clock.step(tensors, generation, values)  # noqa: E731
    return Question(clock.facts(tensors, generation), decide, number, call, clock.digest(generation))
