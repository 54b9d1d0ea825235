"""Plans for the tests of this folder."""

from __future__ import annotations

from functools import cache
from typing import Any

from fxpass.make_plan import plan
from fxpass.models.small import case
from fxpass.plan import Plan
from tests.runtime.plans import block, inputs


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
