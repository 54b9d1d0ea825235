"""`fxpass trace MODEL -o FILE`: the timeline of all ranks, predicted or measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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


def trace(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write; '-' is standard output.")
    ],
    world_size: World = 2,
    strategy: StrategyName = "sync",
    cfg: Cfg = 1,
    data: Data = 1,
    patches: Patches = None,
    speeds: Speeds = None,
    stages: Stages = 1,
    target: TargetName = "auto",
    link: LinkName = None,
    graphs: Graphs = False,
    measured: Annotated[
        bool, typer.Option("--measured", help="Run it on processes of this machine's CPU, and record what they do.")
    ] = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
) -> None:
    """Predict the timeline of all ranks, in Chrome's trace format: open it at https://ui.perfetto.dev.

    It has an exact step and, if the strategy has them, two displaced ones. With --measured it is recorded, with the
    same names, so that the two can be laid over each other; models run in float32.
    """
    from ...models.resolve import Options
    from ...predict.timeline import timeline
    from .. import output as out
    from .plan import deal_of, make

    out.check(output)
    deal = deal_of(world_size, cfg, data, patches, speeds, stages)
    if measured:
        if deal.counts or deal.speeds:
            raise ValueError("--measured runs one patch on each process: leave out --patches and --speed")
        if (target, link, graphs) != ("auto", None, False):
            raise ValueError("--measured runs on this machine: leave out --target, --link and --graphs")
        sizes = {"height": height, "width": width, "frames": frames, "batch": batch}
        request = {"strategy": strategy, "cfg": cfg, "data": data, "stages": stages}
        out.write(output, _recorded({"model": model, "options": sizes, **request}, world_size))
        return
    options = Options(height, width, frames, batch)
    plan = make(model, world_size, strategy, target, options, link=link, cfg=cfg, data=data, graphs=graphs, deal=deal)
    out.write(output, timeline(plan.priced(graphs=graphs), plan.placement, plan.target.link))


def _recorded(request: dict[str, Any], world_size: int) -> str:
    """The timeline of processes that run a model."""
    from ...ir.progress import progress
    from ...planning import strategy_of
    from ...predict.ranks import run_ranks
    from ...predict.recorded import Log, timeline
    from .. import trace_rank
    from .check import refuse_large

    strategy_of(request["strategy"])
    refuse_large(request["model"])
    trace_rank.planned(request, world_size)  # what is wrong is said here, once
    with progress(f"run {world_size} processes"):
        logs = run_ranks("fxpass.tools.trace_rank", [json.dumps(request)], world_size, trace_rank.TIMEOUT)
    return timeline([Log.of(json.loads(each)) for each in logs])
