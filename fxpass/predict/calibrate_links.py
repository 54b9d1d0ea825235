"""Measure what joins the processes of this machine: shared memory, and gloo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from ..passes.targets import Link, Medium
from ..runtime.shared_memory import DISABLE
from .link_rank import SIZES, TIMEOUT
from .ranks import run_ranks

WORLD = 2  #: ranks that exchange messages
SOURCE = "measured by fxpass calibrate, 2 processes of one thread"


def links() -> dict[str, Link]:
    """The links between CPU processes of this machine, by name; gloo alone where they cannot share memory."""
    found: dict[str, Link] = {}
    shared, seconds = _measured({})
    where = "between processes of this machine"
    if shared:  # each rank copies its part and those of all others
        found["shm"] = _link("shm", f"shared memory {where}", "memory", seconds, WORLD)
        _, seconds = _measured({DISABLE: "1"})
    gloo = _link("gloo", f"gloo {where}", "bus", seconds, WORLD * (WORLD - 1))
    return found | {"gloo": replace(gloo, overtake=True)}


def _link(name: str, description: str, medium: Medium, seconds: tuple[float, float], parts: int) -> Link:
    """The link that takes so many seconds for messages of `SIZES`, and carries so many parts of this size."""
    small, large = seconds
    bandwidth = parts * (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
    return Link(name, description, medium, small, bandwidth, sources=dict.fromkeys(("latency", "bandwidth"), SOURCE))


def _measured(variables: Mapping[str, str]) -> tuple[bool, tuple[float, float]]:
    """Whether the ranks share memory, and the seconds of messages of `SIZES`."""
    result = json.loads(run_ranks("fxpass.predict.link_rank", (), WORLD, TIMEOUT, variables)[0])
    return result["shared"], tuple(result["seconds"])
