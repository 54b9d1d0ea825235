"""`fxpass trace MODEL -o FILE`: the predicted timeline of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Batch, Frames, Graphs, Height, LinkName, Model, StrategyName, TargetName, Width, World


def trace(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write; '-' is standard output.")
    ],
    world_size: World = 2,
    strategy: StrategyName = "sync",
    target: TargetName = "auto",
    link: LinkName = None,
    graphs: Graphs = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
) -> None:
    """Predict the timeline of all ranks, in Chrome's trace format: open it at https://ui.perfetto.dev.

    It has an exact step and, if the strategy has them, two displaced ones.
    """
    from ...models.resolve import Options
    from ...predict.prediction import Steps
    from ...predict.timeline import timeline
    from .. import output as out
    from .plan import make

    out.check(output)
    plan = make(model, world_size, strategy, target, Options(height, width, frames, batch), link=link)
    steps = Steps.of(plan.program, plan.graph, world_size, plan.target, graphs=graphs)
    out.write(output, timeline(steps, world_size, plan.target.link))
