"""Plan a model or a captured program for so many ranks: check the arguments, run the passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .capture import capture
from .ir.advice import warn
from .ir.program import Program
from .ir.strategy import Strategy
from .passes import Build, build, resume
from .passes.samples import IndivisibleError, stacked
from .passes.targets import Target
from .plan import Plan
from .planning import (
    ONE_EACH,
    Chooser,
    Deal,
    check_target,
    check_world_size,
    groups_of,
    refuse_deal,
    strategy_of,
    target_of,
    warn_undivided,
)


class FallbackError(ValueError):
    """`strict=True`, and some operators cannot be split; the message lists them."""


def make_plan(
    program: Program,
    world_size: int,
    strategy: Strategy | Chooser,
    target: str | Target = "auto",
    link: str | None = None,
    *,
    groups: int = 1,
    deal: Deal = ONE_EACH,
    together: bool = False,
    strict: bool = False,
) -> Plan:
    """Plan a captured program for `world_size` processes. Raises as `plan` does.

    Args:
        strategy: or what chooses one, and the mesh.
        deal: how the stages and the patches of a group are dealt to its processes.
        groups: of ranks, among which the samples of a batch are divided, if they are independent; they divide
            `world_size`. Otherwise all ranks work on patches of all samples, and a warning says why.
        together: where the batch cannot be divided evenly, each group runs a call of its own instead, unless calls
            write to arguments or leave something behind. Inputs and outputs are stacked then.
    """
    check_world_size(world_size)
    started = time.perf_counter()
    machine = target_of(target, program, link)
    copies = 1
    if not isinstance(strategy, Strategy):
        choice = strategy(program, world_size, groups, machine)
        strategy, groups, copies = choice.strategy, choice.groups, choice.copies
    ranks = deal.ranks(world_size)
    result: Build = build(
        program, ranks, machine, strategy, groups=groups, copies=copies, stages=deal.stages, speeds=deal.speeds,
        after="samples",
    )  # fmt: skip
    if together and isinstance(result.mixed, IndivisibleError) and not program.written and not program.changes:
        result = replace(result, samples=stacked(result.program, groups), mixed=None)
    result = resume(result, after="samples")
    warn_undivided(result, groups)
    assert result.graph is not None
    seconds = result.program.seconds | {"plan": time.perf_counter() - started}
    plan = Plan(
        result.program, result.graph, ranks, strategy, result.target, dict(result.cuts), seconds, result.tried,
        result.mesh.groups, result.samples.calls if result.samples else 1, result.copies if result.samples else 1,
        deal.counts, deal.speeds, deal.stages,
    )  # fmt: skip
    if strict and plan.gathered:
        raise FallbackError(
            f"strict=True, but {len(plan.gathered)} operators cannot be split and would run whole on every rank:\n"
            + "\n".join(f"  {each}" for each in plan.gathered)
        )
    if plan.seen_whole:
        first = plan.seen_whole[0]
        warn(
            f"strategy {strategy.name!r}: {len(plan.seen_whole)} exchanges of keys and values have no window; the "
            f"first, for {first.node} in {first.path or 'the model'}: {first.reason}"
        )
    return plan


def plan(
    model: nn.Module | Program,
    *args: Any,
    world_size: int,
    strategy: str | Strategy = "sync",
    cfg: int = 1,
    data: int = 1,
    patches: int | None = None,
    speeds: Sequence[float] | None = None,
    stages: int = 1,
    target: str | Target = "auto",
    link: str | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> Plan:
    """Plan `model(*args, **kwargs)` on `world_size` processes without running it. Weight-free (fake) models work.

    `target` names a device, or a file that describes one; `link` what joins the ranks (docs/targets.md lists both).
    `strategy="auto"` takes what is predicted to be fastest there: "displaced" or "sync", any number of groups, and
    fewer ranks if that is faster (`Plan.copies`). Planning takes several times as long.
    `cfg`, `data`, `patches`, `speeds` and `stages` are those of `parallelize`.

    Raises `CaptureError` if the model cannot be captured, `WorldSizeError` (a `ValueError`) if it cannot be split over
    so many ranks, and with `strict` `FallbackError` (a `ValueError`) if an operator cannot be split (`Plan.gathered`).
    """
    check_world_size(world_size)
    groups = groups_of(world_size, cfg, data)
    check_target(target, link)
    chosen = strategy_of(strategy)
    deal = Deal.of(world_size, groups, patches, speeds, stages)
    refuse_deal(chosen, deal)
    program = model if isinstance(model, Program) else capture(model, *args, **kwargs)
    return make_plan(program, world_size, chosen, target, link, groups=groups, deal=deal, strict=strict)
