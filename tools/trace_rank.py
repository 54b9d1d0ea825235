"""One rank of `fxpass trace --measured`: `python -m fxpass.tools.trace_rank PORT RANK WORLD REQUEST`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from ..capture import Call
from ..capture.structure import WeightTable
from ..ir.step import EXACT, Step
from ..make_plan import plan
from ..models.resolve import Options, resolve
from ..passes.lower_comm import StepPrograms
from ..plan import Plan
from ..predict.ranks import join, leave
from ..predict.recorded import Log, Span, now, recorded

TIMEOUT = 600.0  #: seconds
DISPLACED = Step(exact=False, pace=1.0)


def planned(request: dict[str, Any], world: int) -> tuple[Any, Plan]:
    """The model that a request names, with weights, and its plan; the same in every process."""
    torch.manual_seed(0)
    found = resolve(request["model"], Options(**request["options"], dtype=torch.float32, fake=False))
    found.module.eval()
    chosen = {name: request[name] for name in ("strategy", "cfg", "data", "stages")}
    return found, plan(found.module, *found.args, **found.kwargs, world_size=world, **chosen)


@torch.no_grad()
def main(port: int, rank: int, world: int, request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    store, network = join(port, rank, world, TIMEOUT)
    found, made = planned(request, world)
    weights = WeightTable(found.module, list(made.program.weights.values())).tensors()
    inputs = Call.of(found.module, found.args, found.kwargs).tensors
    log = Log()
    (channels,) = network.open(StepPrograms(made.graph, rank).channels, torch.device("cpu"))
    runner = recorded(made, channels, rank, log)
    displaced = [] if made.strategy.exact else [DISPLACED, DISPLACED]

    def run(step: Step) -> None:
        began = now()
        runner.run(weights, inputs, 0, runner.mode(step), step.pace)
        log.steps.append(Span("exact step" if step.exact else "displaced step", "step", began, now()))

    for step in (EXACT, *displaced, EXACT):  # to warm up; the last receives what is in flight
        run(step)
    log.clear()
    for step in (EXACT, *displaced):
        run(step)
    written = json.dumps(asdict(log))
    run(EXACT)
    leave(store, network, written)


if __name__ == "__main__":
    port, rank, world = map(int, sys.argv[1:4])
    main(port, rank, world, json.loads(sys.argv[4]))
