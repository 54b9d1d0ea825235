"""Run displaced steps of a small function and check law 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpass.capture import Call, capture
from fxpass.capture.structure import WeightTable
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Layout
from fxpass.ir.program import Program
from fxpass.ir.step import EXACT, Step
from fxpass.ir.strategy import Strategy
from fxpass.ir.verify import verify
from fxpass.passes.bucket import bucket
from fxpass.passes.displace import displace
from fxpass.passes.narrow import narrow
from fxpass.passes.normalize import normalize
from fxpass.passes.partition import partition
from fxpass.passes.rules import RULES
from fxpass.passes.schedule import schedule
from fxpass.passes.targets import find
from fxpass.plan import Plan
from fxpass.runtime.lockstep import LockstepExecutor
from tests.passes.harness import Function, assert_equal, overlap, refreshed, same_bits, with_rounding

PRESETS = ("displaced", "compressed", "corrected_async_gn", "stale_gn", "sync_gn", "pcpp")
STALE = Step(exact=False, pace=1.0)


@dataclass(frozen=True)
class Followed:
    """Displaced steps that were as promised."""

    stale: int  #: how many exchanges were
    finite: bool  #: whether what is finite at an exact step was so at displaced ones
    moved: bool  #: whether the displaced steps in motion were off at all


@torch.no_grad()
def follow(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    cuts: Mapping[int, Layout],
    world: int,
    preset: str,
    program: Program | None = None,
    known: dict[str, Followed] | None = None,
) -> Followed:
    """An exact step, a displaced one at rest, two on other inputs. All inputs are ones that move.

    Args:
        program: what `captured` makes of the model, if it is there already.
        known: what was found of graphs of the same program, which are not run again: strategies differ in what may be
            stale, and many functions exchange nothing of that kind.

    Raises `AssertionError` where the displaced step at rest is another than the exact one though attention sees as
    much, or ranks do not agree.
    """
    module = _module(model)
    strategy = Strategy.of(preset)
    program = program or captured(model, inputs)
    layouts = {program.inputs[i]: layout for i, layout in cuts.items()}
    graph = partition(program.graph, world, layouts, RULES)
    graph = displace(with_rounding(graph, world) if overlap(graph) else graph, strategy, program.inputs, world)
    verify(graph, "displaced", world)
    graph = schedule(bucket(narrow(graph, strategy.windows)))
    verify(graph, "scheduled", world)
    written = repr([(node.name, node.target, node.args, node.kwargs) for node in graph.nodes])
    if known is not None and written in known:
        return known[written]
    plan = Plan(program, graph, world, strategy, find("cpu"), layouts, {})
    weights = WeightTable(module, list(program.weights.values())).tensors()
    rest, motion = (Call.of(module, tuple(map(refreshed, inputs)), {}).tensors for _ in range(2))
    loaded = LockstepExecutor(world, check=True).load(plan, weights, rest)
    exact = agreed(loaded.run_all(weights, rest, EXACT))
    windowed = any(isinstance(each.declared, Fetch) and each.declared.window for each in plan.exchanges)
    assert strategy.windows or not windowed
    for found in loaded.run_all(weights, rest, STALE):
        if not windowed:  # else attention sees less than at an exact step
            assert_equal(found, exact, f"at rest, {preset}")
    firsts = [agreed(loaded.run_all(weights, motion, STALE)) for _ in range(2)]
    exact = agreed(loaded.run_all(weights, motion, EXACT))
    pairs = [pair for first in firsts for pair in zip(first, exact, strict=True)]
    followed = Followed(
        stale=sum(each.declared.fresh not in ("sync", "frozen") for each in plan.exchanges),
        finite=all(a.isfinite().all() or not b.isfinite().all() for a, b in pairs),
        moved=not all(torch.allclose(a, b, equal_nan=True) for a, b in pairs),
    )
    if known is not None:
        known[written] = followed
    return followed


def captured(model: Callable[..., Any], inputs: Sequence[Any]) -> Program:
    """The normalized program of a model."""
    return normalize(capture(_module(model), *inputs))


def _module(model: Callable[..., Any]) -> nn.Module:
    return (model if isinstance(model, nn.Module) else Function(model)).eval()


def agreed(outputs: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The outputs of all ranks, which must be the same bits."""
    first, *others = outputs
    assert all(same_bits(a, b) for found in others for a, b in zip(found, first, strict=True)), "ranks differ"
    return first
