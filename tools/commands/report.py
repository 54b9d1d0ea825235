"""`fxpass report MODEL -o FILE`: one page about a plan."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
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
    Steps,
    StrategyName,
    TargetName,
    Width,
    World,
)


def report(
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
    steps: Steps = 50,
    graphs: Graphs = False,
    compare: Annotated[
        bool, typer.Option(help="Also predict 1, 2, 4 and 8 ranks, with exact and with displaced steps.")
    ] = True,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="Write a zip file for a bug report: the page, versions, plan, dump and log."),
    ] = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
) -> None:
    """Write one page of HTML about a plan: rows, modules, exchanges, predicted times and memory, other choices.

    It works without a network and without a server. Takes seconds and no memory for weights.
    """
    from ...models.resolve import Options
    from ...report.bundle import bundle as packed
    from ...report.bundle import recorded
    from ...report.facts import Facts
    from ...report.page import check_report, page
    from .. import output as out
    from ..parts import parts_of
    from .plan import deal_of, make

    out.check(output)
    deal = deal_of(world_size, cfg, data, patches, speeds, stages)
    check_report()
    command = " ".join(["fxpass", *sys.argv[1:]])
    with recorded() as log:
        try:
            options = Options(height, width, frames, batch)
            plan = make(
                model, world_size, strategy, target, options, link=link, cfg=cfg, data=data, graphs=graphs, deal=deal
            )
            facts = Facts(model, plan, steps, graphs, compare, parts_of(model, options))
            content = packed(command, log.getvalue(), facts) if bundle else page(facts)
        except (ValueError, LookupError, OSError):  # wrong arguments
            raise
        except Exception:
            if bundle:
                out.write(output, packed(command, f"{log.getvalue()}{traceback.format_exc()}"))
            raise
    out.write(output, content)
