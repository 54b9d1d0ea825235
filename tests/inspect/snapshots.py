"""Snapshots of plans, for the tests of this folder."""

from __future__ import annotations

from functools import cache
from typing import Any

from fxpass.inspect.collect import snapshot
from fxpass.inspect.record import Snapshot
from fxpass.models.small import case
from fxpass.plan import Plan, plan
from tests.runtime.plans import block, inputs


def of(made: Plan, rank: int = 0, model: str = "") -> Snapshot:
    """The snapshot of a plan."""
    return snapshot(
        made.program, made.graph, world=made.world_size, target=made.target, cuts=made.cuts,
        rank=rank, model=model, stage="schedule", strategy=made.strategy.name,
    )  # fmt: skip


@cache
def planned(strategy: str = "sync", world: int = 2) -> Plan:
    """The plan of a small denoiser with every kind of exchange."""
    return plan(block(), *inputs(), world_size=world, strategy=strategy)


@cache
def small(name: str, world: int = 2, strategy: str = "sync") -> Plan:
    """The plan of a small model."""
    chosen = case(name)
    model: Any = chosen.build()
    return plan(model, **chosen.inputs(rows=32, seed=0, module=model), world_size=world, strategy=strategy)
