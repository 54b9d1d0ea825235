"""Compare numbers of ranks and strategies on a target, and say which would be faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..inspect.words import count_text, seconds_text
from ..ir.layout import Layout
from ..ir.program import Program
from ..ir.progress import progress
from ..ir.strategy import Strategy
from ..passes import build, resume
from ..passes.limits import WorldSizeError
from ..passes.targets import Target
from .parts import Parts
from .prediction import Prediction, predict
from .price import Prices

CLEARLY = 1.03  #: another choice is recommended if it is so many times as fast
USUAL = 50  #: steps of a generation, where nothing else is known


@dataclass(frozen=True)
class Impossible:
    """A number of ranks that cannot share the model."""

    world: int
    reason: str


def compared(
    program: Program,
    worlds: Sequence[int],
    strategies: Sequence[Strategy],
    target: Target,
    *,
    graphs: bool = False,
    parts: Parts | None = None,
    cuts: Mapping[int, Mapping[str, Layout]] | None = None,
) -> Iterator[Prediction | Impossible]:
    """Predict each number of ranks with each strategy; one rank once.

    Args:
        program: as captured, or normalized.
        parts: of the pipeline beside its denoiser.
        cuts: those of numbers of ranks for which they are known.
    """
    strategies = list(dict.fromkeys(strategies))
    for world in worlds:
        try:
            cut = build(program, world, target, strategies[0], after="trim", cuts=(cuts or {}).get(world))
        except WorldSizeError as error:
            yield Impossible(world, str(error))
            continue
        prices = Prices(target.device, world)
        for strategy in strategies[:1] if world == 1 else strategies:
            with progress(f"predict {world} ranks, {strategy.name}"):
                made = resume(replace(cut, strategy=strategy), after="trim")
                found = predict(made.program, made.current, world, strategy, target, graphs=graphs, prices=prices)
            yield found if parts is None else parts.with_memory(found)


def advice(chosen: Prediction, others: Sequence[Prediction], steps: int) -> str | None:
    """What would be faster than `chosen`, in one sentence; None if nothing is, clearly.

    Args:
        steps: of the generation that is compared.
    """
    others = [each for each in others if each.fits is not False or chosen.fits is False]
    best = min(others, key=lambda each: each.generation(steps), default=chosen)
    mine, theirs = chosen.generation(steps), best.generation(steps)
    if mine < theirs * CLEARLY:
        return None
    if best.world == 1:
        times = f"{seconds_text(mine)} instead of {seconds_text(theirs)} for {count_text(steps, 'step')}"
        if chosen.world == 1:
            return f"no split would be faster: several patches in turn take {times}"
        ranks = f"{chosen.world} ranks over {chosen.target.link.name}"
        return f"no split would be faster: {ranks} would be slower than 1, {times}"
    better = [f"{best.world} ranks"] if best.world != chosen.world else []
    better += [f"strategy {best.strategy.name!r}"] if best.strategy != chosen.strategy else []
    times = f"{seconds_text(theirs)} instead of {seconds_text(mine)} for {count_text(steps, 'step')}"
    return f"{' with '.join(better) or 'one patch of the whole model on each process'} would be faster: {times}"


def slower_than_fewer(program: Program, predicted: Prediction) -> str | None:
    """A sentence if fewer ranks are predicted to be faster; None if they are not.

    One rank is tried, then half of the ranks, and fewer and fewer as long as that is faster.
    """

    def alone(world: int) -> list[Prediction]:
        rows = compared(program, (world,), (predicted.strategy,), predicted.target, graphs=predicted.graphs)
        return [each for each in rows if isinstance(each, Prediction)]

    if predicted.world == 1:
        return None
    found, best, world = alone(1), predicted, predicted.world // 2
    while world > 1 and (made := alone(world)) and made[0].generation(USUAL) < best.generation(USUAL):
        found += made
        best, world = made[0], world // 2
    return advice(predicted, found, USUAL)
