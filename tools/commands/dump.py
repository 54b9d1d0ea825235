"""`fxpass dump MODEL`: print one rank's graph after any pass, or what a pass changed."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Batch, Frames, Height, Model, StrategyName, TargetName, Width, World

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...passes import Build

CAPTURED = "captured"  #: the graph before the first pass


def dump(
    model: Model,
    world_size: World = 2,
    rank: Annotated[int, typer.Option(min=0, help="Whose graph.")] = 0,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help=f"Stop after this pass ({CAPTURED}: before the first).")
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what the pass changed instead.")] = False,
    strategy: StrategyName = "sync",
    target: TargetName = "auto",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
) -> None:
    """Print one rank's graph: operators with their layouts, exchanges with role and bytes, by module."""
    from ...capture import capture
    from ...ir.strategy import Strategy
    from ...models.resolve import Options, resolve
    from .plan import check_target

    names = stages()
    if after is not None and after not in names:
        near = difflib.get_close_matches(after, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no pass is called {after!r}; {hint}The passes are {', '.join(names)}")
    if rank >= world_size:
        raise ValueError(f"there is no rank {rank}: ranks are counted from 0 to {world_size - 1}")
    Strategy.of(strategy)
    check_target(target)
    stage = after or names[-1]
    resolved = resolve(model, Options(height, width, frames, batch))
    program = capture(resolved.module, *resolved.args, **resolved.kwargs)
    if diff:
        typer.echo(difference(program, world_size, rank, stage, target, strategy))
        return
    typer.echo(f"{model}, rank {rank} of {world_size}, after {stage}")
    typer.echo(text(program, world_size, rank, stage, target, strategy))


def stages() -> list[str]:
    """The values of `--after`, in order."""
    from ...passes import PASSES

    return [CAPTURED, *(each.name for each in PASSES)]


def text(program: Program, world_size: int, rank: int, stage: str, target: str = "auto", strategy: str = "sync") -> str:
    """The graph of a captured program after `stage`, below a heading with what is split and how much is exchanged."""
    from ...ir.program import calls, exchanges_of
    from ...plan import gathered_in, uncounted_in
    from ..printer import bytes_text, cut_values_text, graph_text

    state = built(program, world_size, stage, target, strategy)
    declared = [each for _, some in exchanges_of(state.current) for each in some]
    rows = cut_values_text(state.program, state.program.graph, state.cuts)
    lines = [f"split: {name} {layout}, {cuts}" for name, layout, cuts in rows]
    count = f"{sum(1 for _ in calls(state.current))} operators"
    if state.graph is not None:
        received = sum(each.received(rank) for each in declared)
        count += f", {len(declared)} exchanges, {bytes_text(received)} received in one call"
        gathered = gathered_in(state.graph)
        unknown = uncounted_in(state.program.graph, gathered)
        lines += [f"uncounted: {number} x {name}, whose work is unknown" for name, number in unknown.items()]
        lines += [f"fallback: {each}" for each in gathered]
    return "\n".join([*lines, count, "", graph_text(state.program, state.current, rank)])


def difference(
    program: Program, world_size: int, rank: int, stage: str, target: str = "auto", strategy: str = "sync"
) -> str:
    """A unified diff of the texts before and after the pass `stage`."""
    names = stages()
    if stage == CAPTURED:
        raise ValueError(f"--diff shows what a pass changed, and nothing comes before {CAPTURED!r}")
    before = names[names.index(stage) - 1]
    old, new = (text(program, world_size, rank, each, target, strategy).splitlines() for each in (before, stage))
    lines = difflib.unified_diff(old, new, f"after {before}", f"after {stage}", lineterm="")
    return "\n".join(lines) or f"{stage} changed nothing"


def built(program: Program, world_size: int, stage: str, target: str, strategy: str) -> Build:
    """The state of the passes after `stage`."""
    from ...ir.strategy import Strategy
    from ...passes import Build, build
    from ...plan import target_of

    machine, fresh = target_of(target, program), Strategy.of(strategy)
    if stage == CAPTURED:
        return Build(program, world_size, machine, fresh)
    return build(program, world_size, machine, fresh, after=stage)
