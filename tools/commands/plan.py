"""`fxpass plan MODEL`: show what is split, and what each rank computes and receives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Batch, Frames, Height, Model, StrategyName, Strict, TargetName, Width, World

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ...plan import Plan


def plan(
    model: Model,
    world_size: World = 2,
    strategy: StrategyName = "sync",
    target: TargetName = "auto",
    strict: Strict = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
    to: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the plan as JSON; '-' is standard output.")
    ] = None,
) -> None:
    """Show how a model is split over ranks. Takes seconds and no memory for weights."""
    from ...models.resolve import Options
    from .. import output
    from ..console import console

    output.check(to)
    made = make(model, world_size, strategy, target, Options(height, width, frames, batch), strict)
    text = json.dumps(made.describe(), indent=2)
    if to == Path("-"):
        output.write(to, text)
        return
    out = console()
    show(out, model, made)
    if to is not None:
        output.write(to, text)
        out.print(f"\nwritten to {to}")


def make(model: str, world_size: int, strategy: str, target: str, options: Any, strict: bool = False) -> Plan:
    """The plan of the model that `model` names; wrong arguments are refused before anything is built."""
    from ...capture import capture
    from ...ir.strategy import Strategy
    from ...models.resolve import resolve
    from ...plan import plan as make_plan

    chosen = Strategy.of(strategy)
    check_target(target)
    resolved = resolve(model, options)
    program = capture(resolved.module, *resolved.args, **resolved.kwargs)
    return make_plan(program, world_size=world_size, strategy=chosen, target=target, strict=strict)


def check_rank(rank: int, world_size: int) -> None:
    """Raises `ValueError` unless there is such a rank."""
    if rank >= world_size:
        raise ValueError(f"there is no rank {rank}: ranks are counted from 0 to {world_size - 1}")


def check_target(target: str) -> None:
    from ...passes.cost import TARGETS

    if target not in ("auto", *TARGETS):
        raise ValueError(f"no target is called {target!r}; the targets are auto, {', '.join(TARGETS)}")


def show(out: Console, model: str, plan: Plan) -> None:
    """Print a plan as tables."""
    from ...inspect.words import flops_text

    out.print(
        f"{model} on {plan.world_size} ranks, strategy {plan.strategy.name}, target {plan.target.name}", style="bold"
    )
    out.print(_cuts(plan))
    out.print(
        f"\nwork {flops_text(plan.flops_total)}, slowest rank {flops_text(max(plan.flops_per_rank))}: "
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

    table = _table("split", "layout", "cuts")
    for cut in cuts_of(plan.program, plan.cuts):
        table.add_row(cut.label, *cut_texts(cut))
    return table if plan.cuts else "nothing is split"


def _ranks(plan: Plan, *, exact: bool = True) -> RenderableType:
    """One row per rank: its work (exact steps only), and the bytes it receives by role."""
    from collections import Counter

    from ...inspect.words import bytes_text, flops_text

    roles = sorted(plan.bytes_by_role, key=lambda role: -plan.bytes_by_role[role])
    table = _table("rank", *(["work"] if exact else []), *roles, "received", right=True)

    def add(name: str, work: int, sizes: list[int]) -> None:
        table.add_row(name, *([flops_text(work)] if exact else []), *map(bytes_text, sizes), bytes_text(sum(sizes)))

    total: Counter[str] = Counter()
    for rank, work in enumerate(plan.flops_per_rank):
        received = plan.bytes_received(rank, exact=exact)
        total.update(received)
        add(str(rank), work, [received.get(role, 0) for role in roles])
    table.add_section()
    add("all", sum(plan.flops_per_rank), [total[role] for role in roles])
    number = Counter(exchange.role for exchange in plan.exchanges if exact or exchange.declared.repeated)
    counts = [str(number[role]) for role in roles]
    table.add_row("exchanges", *([""] if exact else []), *counts, str(sum(number.values())))
    return table


def _fallbacks(plan: Plan) -> RenderableType:
    from ...inspect.words import bytes_text

    table = _table("operator", "module", "operands", "bytes", "reason")
    for each in plan.gathered:
        shapes = ", ".join("x".join(map(str, shape)) for shape in each.shapes)
        table.add_row(each.node, each.path or "(the model itself)", shapes, bytes_text(each.bytes), each.reason)
    return table


def _table(*headings: str, right: bool = False) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if right and i else "left")
    return table
