"""`fxpass dump MODEL`: show one rank's graph after any pass, or what a pass changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
    StrategyName,
    TargetName,
    Width,
    World,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...inspect.record import Snapshot
    from ...ir.program import Program
    from ...ir.step import Mode
    from ...ir.strategy import Strategy
    from ...models.resolve import Options
    from ...passes import Build
    from ...passes.targets import Target
    from ...planning import Chooser, Deal

CAPTURED = "captured"  #: the graph before the first pass
FORMATS = ("text", "json", "dot", "svg", "onnx")


def dump(
    model: Model,
    world_size: World = 2,
    rank: Annotated[int, typer.Option(min=0, help="Whose graph.")] = 0,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help=f"Stop after this pass ({CAPTURED}: before the first).")
    ] = None,
    diff: Annotated[str | None, typer.Option(metavar="PASS", help="Show what this pass changed instead.")] = None,
    module: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only modules with such paths, e.g. 'down_blocks.1.*'.")
    ] = None,
    op: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this operator, or exchanges of this role.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="WHAT", help="`exchanges`: nothing but these.")] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Show every operator, in the order of execution.")] = False,
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            "--format", "-f", help=f"{', '.join(FORMATS)}; dot and svg draw the folded graph, onnx is a step's program."
        ),
    ] = "text",
    mode: Annotated[
        str | None, typer.Option(metavar="MODE", help="Of an onnx step: exact, first or steady.", show_default="exact")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="Write the weights of an onnx step to this file beside it.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = None,
    strategy: StrategyName = "sync",
    cfg: Cfg = 1,
    data: Data = 1,
    patches: Patches = None,
    speeds: Speeds = None,
    stages: Stages = 1,
    target: TargetName = "auto",
    link: LinkName = None,
    graphs: Graphs = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
) -> None:
    """Show one rank's graph by module: operators with layouts and costs, exchanges with roles and bytes.

    Modules that repeat are shown once; --unfold, --module, --op and --only show every operator of theirs.
    """
    from ...inspect.draw import graphviz
    from ...inspect.onnx_export import write_onnx
    from ...models.resolve import Options
    from ...planning import check_target, groups_of, refuse_deal, strategy_of, target_of
    from .. import output as out
    from .check import refuse_large
    from .plan import check_rank, deal_of

    if diff is not None and after is not None:
        raise ValueError("--diff PASS says already after which pass; leave out --after")
    check_choice("pass", after or diff or CAPTURED, states())
    check_choice("format", format, FORMATS)
    check_choice("selection", only or "exchanges", ("exchanges",))
    if diff == CAPTURED:
        raise ValueError(f"--diff shows what a pass changed, and nothing comes before {CAPTURED!r}")
    onnx_step: tuple[Path, Mode] | None = None
    if format == "onnx":
        others = (after, diff, module, op, only, "--unfold" if unfold else None)
        onnx_step = onnx_options(mode, output, weights, *others)
        if stages > 1:
            raise ValueError("transfers between stages have no ONNX form; leave out --stages")
    elif mode is not None or weights is not None:
        raise ValueError("--mode and --weights are for --format onnx")
    if diff is not None and format != "text":
        raise ValueError(f"--diff is text; it has no format {format!r}")
    groups, deal = groups_of(world_size, cfg, data), deal_of(world_size, cfg, data, patches, speeds, stages)
    check_rank(rank, deal.ranks(world_size))
    chosen = strategy_of(strategy, graphs=graphs)
    refuse_deal(chosen, deal)
    check_target(target, link)
    out.check(output)
    if format == "svg":
        graphviz()
    if weights is not None:
        refuse_large(model)
    program, given = captured(model, Options(height, width, frames, batch), weighted=weights is not None)
    machine = target_of(target, program, link)

    def made(stage: str) -> Build:
        return built(program, world_size, stage, machine, chosen, groups, deal)

    def shown(state: Build, stage: str) -> Snapshot:
        return taken(model, state, rank, stage)

    wanted = {"module": module, "operator": op, "exchanges": only is not None}
    if diff is not None:
        names = states()
        before = names[names.index(diff) - 1]
        first = made(before)
        out.write(output, difference(shown(first, before), shown(following(first, diff), diff), wanted))
        return
    stage = after or states()[-1]
    state = made(stage)
    if onnx_step is not None:
        write_onnx(state.program, state.current, shown(state, stage), *onnx_step, model=given, weights=weights)
        return
    snapshot = shown(state, stage).only(**wanted)
    process = "" if not deal.counts else f" on process {deal.placement(world_size).process(rank)} of {world_size}"
    out.write(output, rendered(snapshot, format, folded=not (unfold or module or op or only), process=process))


def captured(model: str, options: Options, *, weighted: bool) -> tuple[Program, nn.Module | None]:
    """The program of a model, and if `weighted` the model with its weights.

    Where the program does not need values, the model is captured without weights, and does not run: a CPU may take
    minutes for that, in half precision hours.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    from ...capture import CaptureError, capture
    from ...models.resolve import resolve

    def missing(tensors: Iterable[Tensor]) -> bool:
        return any(isinstance(each, FakeTensor) for each in tensors)

    made = resolve(model, options)
    try:
        program = capture(made.module, *made.args, **made.kwargs)
    except CaptureError:
        if not weighted or not missing(made.module.parameters()):
            raise
        program = None
    if not weighted:
        assert program is not None
        return program, None
    if missing(made.module.parameters()):
        made = resolve(model, replace(options, fake=False))
    if program is None or missing(program.constants.values()):
        program = capture(made.module, *made.args, **made.kwargs)
    return program, made.module


def onnx_options(mode: str | None, output: Path | None, weights: str | None, *others: str | None) -> tuple[Path, Mode]:
    """The file and the mode of a step's program.

    Raises `ValueError` unless options fit one, and `MissingExtraError` unless onnx is installed.
    """
    from ...inspect.onnx_export import check_onnx, check_weights
    from ...ir.step import MODES

    check_onnx()
    wanted = check_choice("mode", mode or "exact", MODES)
    if output is None or output == Path("-"):
        raise ValueError("--format onnx is binary; give --output FILE")
    if weights is not None:
        check_weights(output, weights)
    if any(each is not None for each in others):
        raise ValueError(
            "--format onnx is a whole program; leave out --after, --diff, --module, --op, --only, --unfold"
        )
    return output, wanted


Name = TypeVar("Name", bound=str)


def check_choice(what: str, name: str, names: Sequence[Name]) -> Name:
    """The one of `names` that `name` is. Raises `ValueError` with the names there are, and the nearest."""
    for each in names:
        if each == name:
            return each
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? There" if near else "there"
    raise ValueError(f"no {what} is called {name!r}; {hint} {'is' if len(names) == 1 else 'are'}: {', '.join(names)}")


def states() -> list[str]:
    """The values of `--after`, in order."""
    from ...passes import PASSES

    return [CAPTURED, *(each.name for each in PASSES)]


def rendered(snapshot: Snapshot, format: str, folded: bool, process: str = "") -> str:  # noqa: A002
    """The snapshot in one of `FORMATS`.

    Args:
        process: that runs its rank, in words.
    """
    from ...inspect import draw, store, text

    makers = {"json": store.to_json, "dot": draw.dot, "svg": draw.svg}
    if format in makers:
        return makers[format](snapshot)
    head = f"{snapshot.model}, rank {snapshot.rank} of {snapshot.world}{process}, after {snapshot.stage}"
    return f"{head}\n{text.text(snapshot, folded=folded)}"


def taken(model: str, state: Build, rank: int, stage: str) -> Snapshot:
    """The snapshot of a state of the passes."""
    from ...inspect.collect import snapshot

    program, ranks = state.program if state.joined else state.part, state.ranks
    return snapshot(
        program, state.current, world=ranks, target=state.target, cuts=state.cuts,
        rank=rank % ranks, model=model, stage=stage, strategy=state.strategy.name,
    )  # fmt: skip


def difference(old: Snapshot, new: Snapshot, wanted: Mapping[str, Any]) -> str:
    """A unified diff of the unfolded texts, in red and green on a terminal.

    Args:
        wanted: arguments of `Snapshot.only`. One of the two must have such nodes.
    """
    from ...inspect.text import text

    texts: list[list[str]] = []
    errors: list[ValueError] = []
    for each in (old, new):
        try:
            texts.append(text(each.only(**wanted), folded=False).splitlines())
        except ValueError as error:
            texts.append([])
            errors.append(error)
    if len(errors) == 2:
        raise errors[-1]
    lines = list(difflib.unified_diff(texts[0], texts[1], f"after {old.stage}", f"after {new.stage}", lineterm=""))
    colours = {"+": "green", "-": "red", "@": "cyan"}
    coloured = [typer.style(line, fg=colours[line[0]]) if line[0] in colours else line for line in lines]
    return "\n".join(coloured) or f"{new.stage} changed nothing"


def built(
    program: Program, world_size: int, stage: str, target: Target, strategy: Strategy | Chooser, groups: int, deal: Deal
) -> Build:
    """The state of the passes after `stage`."""
    from ...ir.strategy import Strategy
    from ...passes import Build, build
    from ...planning import warn_undivided
    from ...predict.choose import Choice

    if isinstance(strategy, Strategy):
        choice = Choice(strategy, groups)
    else:
        choice = strategy(program, world_size, groups, target)
    start = Build(
        program, deal.ranks(world_size), target, choice.strategy, groups=choice.groups, copies=choice.copies,
        stages=deal.stages, speeds=deal.speeds,
    )  # fmt: skip
    if stage == CAPTURED:
        return start
    state = build(
        program, start.world, target, start.strategy, groups=start.groups, copies=start.copies, stages=start.stages,
        speeds=start.speeds, after=stage,
    )  # fmt: skip
    warn_undivided(state, start.groups)
    return state


def following(state: Build, name: str) -> Build:
    """The state after the pass `name`, which comes next."""
    from ...ir.verify import verify
    from ...passes import PASSES

    (each,) = (each for each in PASSES if each.name == name)
    state = each.run(state)
    verify(state.current, each.ensures, state.mesh.patches)
    return state
