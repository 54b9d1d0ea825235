"""`fxpass explain MODEL NODE`: why a node is split as it is, and why it exchanges what it does."""

from __future__ import annotations

from typing import Annotated

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


def explain(
    model: Model,
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="A node of `fxpass dump`, or an exchange (x3.1).", show_default=False)
    ],
    world_size: World = 2,
    rank: Annotated[int, typer.Option(min=0, help="Whose sizes and bytes.")] = 0,
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
    """Explain a node: its rule, where its split comes from, its exchanges, and which cuts the search tried."""
    from ...models.resolve import Options
    from .plan import check_rank, deal_of, make

    deal = deal_of(world_size, cfg, data, patches, speeds, stages)
    check_rank(rank, deal.ranks(world_size))
    options = Options(height, width, frames, batch)
    plan = make(model, world_size, strategy, target, options, link=link, cfg=cfg, data=data, graphs=graphs, deal=deal)
    typer.echo(plan.explain(node, rank))
