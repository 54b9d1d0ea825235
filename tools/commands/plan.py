"""`fxpass plan MODEL`: show what is split, and what each rank computes and receives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import (
    Batch,
    Cfg,
    Data,
    Frames,
    Graphs,
    Height,
    LinkName,
    Model,
    Patches,
    Speeds,
    Stages,
    Steps,
    StrategyName,
    Strict,
    TargetName,
    Width,
    World,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ...plan import Plan
    from ...planning import Deal
    from ...predict.compare import Impossible
    from ...predict.parts import Parts
    from ...predict.prediction import Prediction


def plan(
    model: Model,
    world_size: World = 2,
    strategy: StrategyName = "sync",
    cfg: Cfg = 1,
    data: Data = 1,
    patches: Patches = None,
    speeds: Speeds = None,
    stages: Stages = 1,
    target: TargetName = "auto",
    link: LinkName = None,
    steps: Steps = 50,
    graphs: Graphs = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also predict 1, 2, 4 and 8 ranks, exact and displaced steps.")
    ] = False,
    strict: Strict = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
    to: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the plan as JSON; '-' is standard output.")
    ] = None,
) -> None:
    """Show how a model is split over ranks. Takes seconds and no memory for weights.

    With --target or --link, also predict how long a step and a generation take, and whether the memory suffices (of a
    pipeline, with its encoders and its autoencoder).
    """
    from ...models.resolve import Options
    from .. import output, predicted
    from ..console import console
    from ..parts import parts_of

    output.check(to)
    options = Options(height, width, frames, batch)
    deal = deal_of(world_size, cfg, data, patches, speeds, stages)
    made = make(model, world_size, strategy, target, options, strict, link, cfg, data, graphs, deal)
    prediction, parts = None, None
    if target != "auto" or link is not None or compare:
        prediction, parts = made.predict(graphs=graphs), parts_of(model, options)
        prediction = prediction if parts is None else parts.with_memory(prediction)
    if to is not None:
        more = {} if prediction is None else {"prediction": prediction.describe(steps)}
        output.write(to, json.dumps(made.describe() | more, indent=2))
    if to == Path("-"):
        return
    out = console()
    show(out, model, made)
    if prediction is not None:
        predicted.show(out, prediction, alternatives(made, compare, graphs, parts), steps)
    if to is not None:
        out.print(f"\nwritten to {to}")


def make(
    model: str,
    world_size: int,
    strategy: str,
    target: str,
    options: Any,
    strict: bool = False,
    link: str | None = None,
    cfg: int = 1,
    data: int = 1,
    graphs: bool = False,
    deal: Deal | None = None,
) -> Plan:
    """The plan of the model that `model` names; wrong arguments are refused before anything is built."""
    from ...capture import capture
    from ...make_plan import make_plan
    from ...models.resolve import resolve
    from ...planning import ONE_EACH, check_target, groups_of, refuse_deal, strategy_of

    groups, chosen, deal = groups_of(world_size, cfg, data), strategy_of(strategy, graphs=graphs), deal or ONE_EACH
    refuse_deal(chosen, deal)
    check_target(target, link)
    resolved = resolve(model, options)
    program = capture(resolved.module, *resolved.args, **resolved.kwargs)
    return make_plan(program, world_size, chosen, target, link, groups=groups, deal=deal, strict=strict)


def deal_of(
    world_size: int, cfg: int, data: int, patches: int | None, speeds: list[float] | None, stages: int = 1
) -> Deal:
    """How the stages and the patches of each group are dealt to its processes."""
    from ...planning import Deal, groups_of

    return Deal.of(world_size, groups_of(world_size, cfg, data), patches, speeds or None, stages)


def alternatives(plan: Plan, compare: bool, graphs: bool, parts: Parts | None = None) -> list[Prediction | Impossible]:
    """Predictions of one rank, and to compare also of other numbers of ranks, with exact and displaced steps.

    None of them has stages.
    """
    from ...ir.strategy import Strategy
    from ...predict.compare import compared

    own = Strategy.of("sync") if plan.strategy.overlaps else plan.strategy
    strategies = [own, *(Strategy.of(name) for name in ("sync", "displaced"))] if compare else [own]
    worlds = (1, 2, 4, 8) if compare else (1,)
    return list(compared(plan.program, worlds, strategies, plan.target, graphs=graphs, parts=parts))


def check_rank(rank: int, world_size: int) -> None:
    """Raises `ValueError` unless there is such a rank."""
    if rank >= world_size:
        raise ValueError(f"there is no rank {rank}: ranks are counted from 0 to {world_size - 1}")


def show(out: Console, model: str, plan: Plan) -> None:
    """Print a plan as tables."""
    from ...inspect.words import bytes_text, flops_text

    out.print(f"{model} on {plan.arrangement}, strategy {plan.strategy.name}, target {plan.target.name}", style="bold")
    out.print(_cuts(plan))
    work, which = plan.placement.sums(plan.flops_per_rank), "process" if plan.placement.several else "rank"
    out.print(
        f"\nwork {flops_text(plan.flops_total)}, slowest {which} {flops_text(max(work))}: "
        f"at most {plan.bound:.2f} times as fast\n"
    )
    for name, count in plan.estimated.items():
        out.print(f"estimated: {count} x {name}, counted as a matrix product of its operands", style="bold yellow")
    for name, count in plan.uncounted.items():
        out.print(f"not counted: {count} x {name}, whose work is unknown", style="bold yellow")
    if plan.strategy.exact:
        out.print(_ranks(plan))
    else:
        out.print("an exact step", style="bold")
        out.print(_ranks(plan))
        out.print("\na displaced step", style="bold")
        out.print(_ranks(plan, exact=False))
        kinds = plan.state_bytes_by_channel.items()
        held = ", ".join(f"{kind} {bytes_text(max(sizes))}" for kind, sizes in kinds)
        out.print(f"kept from step to step per guidance branch: {held}", soft_wrap=True)
    if plan.stages > 1:
        out.print("\nmemory", style="bold")
        out.print(_memory(plan))
    seconds = plan.seconds
    if plan.fallbacks:
        out.print("\nfallbacks: gathered whole, because no rule could split them", style="bold yellow")
        out.print(_fallbacks(plan))
    else:
        out.print("\nno fallbacks: everything that could be split is split")
    out.print(f"captured in {seconds['capture']:.1f} s, planned in {seconds['plan']:.1f} s")


def _cuts(plan: Plan) -> RenderableType:
    from ...inspect.collect import cuts_of
    from ...inspect.text import cut_texts

    shown = table("split", "layout", "cuts")
    for cut in cuts_of(plan.program, plan.cuts):
        shown.add_row(cut.label, *cut_texts(cut))
    return shown if plan.cuts else "nothing is split"


def _ranks(plan: Plan, *, exact: bool = True) -> RenderableType:
    """One row per rank: its work (exact steps only), and the bytes it receives by role."""
    from collections import Counter

    from ...inspect.words import bytes_text, flops_text

    roles = sorted(plan.bytes_by_role, key=lambda role: -plan.bytes_by_role[role])
    shown = table("rank", *(["work"] if exact else []), *roles, "received", right=True)

    def add(name: str, work: int, sizes: list[int]) -> None:
        shown.add_row(name, *([flops_text(work)] if exact else []), *map(bytes_text, sizes), bytes_text(sum(sizes)))

    total: Counter[str] = Counter()
    for rank, work in enumerate(plan.flops_per_rank):
        received = plan.bytes_received(rank, exact=exact)
        total.update(received)
        add(str(rank), work, [received.get(role, 0) for role in roles])
    shown.add_section()
    add("all", sum(plan.flops_per_rank), [total[role] for role in roles])
    number = Counter(exchange.role for exchange in plan.exchanges if exact or exchange.declared.repeated)
    counts = [str(number[role]) for role in roles]
    shown.add_row("exchanges", *([""] if exact else []), *counts, str(sum(number.values())))
    return shown


def _memory(plan: Plan) -> RenderableType:
    """One row per process: its stage, and what it holds."""
    from ...inspect.words import bytes_text

    shown = table("process", "stage", "weights", "of all", "state", "activations", right=True)
    found = plan.predict().memories
    whole = plan.weights
    for process, (ranks, each) in enumerate(zip(plan.placement, found, strict=True)):
        sizes = bytes_text(each.weights), f"{each.weights / whole:.1%}" if whole else ""
        stage = str(plan.mesh.stage(ranks[0]))
        shown.add_row(str(process), stage, *sizes, bytes_text(each.state), bytes_text(each.activations))
    return shown


def _fallbacks(plan: Plan) -> RenderableType:
    from ...inspect.words import bytes_text

    shown = table("operator", "module", "operands", "bytes", "reason")
    for each in plan.gathered:
        shapes = ", ".join("x".join(map(str, shape)) for shape in each.shapes)
        shown.add_row(each.node, each.path or "(the model itself)", shapes, bytes_text(each.bytes), each.reason)
    return shown


def table(*headings: str, right: bool = False) -> Table:
    """An empty table without lines.

    Args:
        right: align all columns but the first to the right.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if right and i else "left")
    return table
