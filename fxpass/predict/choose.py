"""Choose how the ranks share the work of a model: the mesh, and whether steps are exact or displaced."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.program import Program
from ..ir.progress import progress
from ..ir.strategy import Strategy
from ..passes import build, resume
from ..passes.limits import WorldSizeError
from ..passes.targets import Target
from .compare import CLEARLY, USUAL
from .prediction import Prediction, predict
from .price import Prices

SYNC, DISPLACED = Strategy.of("sync"), Strategy.of("displaced")


@dataclass(frozen=True)
class Choice:
    """How `groups` x `copies` x patches ranks share the work, and what that is predicted to take.

    Attributes:
        groups: of ranks, among which the samples of a batch are divided.
        copies: so many groups do the same: 1, unless fewer ranks than there are would be faster.
    """

    strategy: Strategy
    groups: int = 1
    copies: int = 1
    prediction: Prediction | None = None

    @property
    def seconds(self) -> float:
        """Of a generation of usual length."""
        return self.prediction.generation(USUAL) if self.prediction else float("inf")


def choose_strategy(program: Program, patches: int, target: Target, *, graphs: bool = False) -> Strategy:
    """`displaced` if its generations are predicted to be clearly faster than exact ones on so many ranks; else `sync`.

    Args:
        program: as captured, or normalized.
        graphs: kernels are launched together, as CUDA graphs do.
    """
    return _best(_with(program, patches, target, graphs, 1, 1)).strategy


def choose(program: Program, world: int, target: Target, *, graphs: bool = False) -> Choice:
    """The fastest of all meshes of `world` ranks with exact or displaced steps.

    Samples of a batch are divided among each number of groups that they allow. There, one patch on each rank is tried,
    then one for all, and in between fewer and fewer as long as that is faster. Ranks that are left over do the same
    once more.

    Args:
        program: as captured, or normalized.
        graphs: kernels are launched together, as CUDA graphs do.
    """
    found: list[Choice] = []
    program = build(program, world, target, SYNC, after="normalize").program  # once for all
    for groups in _divisors(world):
        if groups > 1 and build(program, world, target, SYNC, groups=groups, after="samples").mixed:
            continue
        first, *between = _divisors(world // groups)
        last = _with(program, world, target, graphs, groups, first)
        found += last
        if between:
            found += _with(program, world, target, graphs, groups, between.pop())
        for copies in between:
            found += (made := _with(program, world, target, graphs, groups, copies))
            if made and last and _seconds(made) >= _seconds(last):
                break
            last = made or last
    return _best(found)


def _with(program: Program, world: int, target: Target, graphs: bool, groups: int, copies: int) -> list[Choice]:
    """Predictions of a mesh with exact and with displaced steps; none if it is not possible."""
    patches, found = world // groups // copies, []
    with progress(f"predict {groups} x {patches} ranks" if groups > 1 else f"predict {patches} ranks"):
        try:
            cut = build(program, world, target, SYNC, groups=groups, copies=copies, after="trim")
        except WorldSizeError:
            return []
        prices = Prices(target.device, world)
        for strategy in (SYNC, DISPLACED)[: 1 + (patches > 1)]:
            made = resume(replace(cut, strategy=strategy), after="trim")
            prediction = predict(made.program, made.current, world, strategy, target, graphs=graphs, prices=prices)
            found.append(Choice(strategy, groups, copies, prediction))
    return found


def _seconds(choices: list[Choice]) -> float:
    return min((each.seconds for each in choices), default=float("inf"))


def _best(found: list[Choice]) -> Choice:
    """The fastest choice that fits the device; displaced steps if that is clearly faster than all exact ones."""
    found = [each for each in found if each.prediction and each.prediction.fits is not False] or found
    exact = min((each for each in found if each.strategy == SYNC), key=lambda each: each.seconds, default=Choice(SYNC))
    displaced = (each for each in found if each.strategy == DISPLACED)
    stale = min(displaced, key=lambda each: each.seconds, default=exact)
    return stale if stale.seconds * CLEARLY < exact.seconds else exact


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
