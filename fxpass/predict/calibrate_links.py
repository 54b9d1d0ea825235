"""Measure what joins the processes of this machine: shared memory, and gloo."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from statistics import mean

from ..passes.targets import Link
from ..runtime.shared_memory import DISABLE
from .link_rank import LATE_SIZES, SIZES, TIMEOUT, Measured
from .ranks import run_ranks

WORLD = 2  #: ranks that exchange messages
SOURCE = "measured by fxpass calibrate, 2 processes of one thread"


def links() -> dict[str, Link]:
    """The links between CPU processes of this machine, by name; gloo alone where they cannot share memory."""
    found = {}
    seen = _measured({})
    where = "between processes of this machine"
    if seen[0].shared:
        found["shm"] = shared_memory(seen, f"shared memory {where}")
        seen = _measured({DISABLE: "1"})
    return found | {"gloo": sockets("gloo", seen, f"gloo {where}", WORLD * (WORLD - 1))}


def shared_memory(seen: list[Measured], description: str) -> Link:
    """The link of ranks that share memory: each copies its part and those of all others."""
    latency, bandwidth = _figures([each.seconds for each in seen], SIZES, WORLD)
    return Link("shm", description, "memory", latency, bandwidth, sources=_sources("latency", "bandwidth"))


def sockets(name: str, seen: list[Measured], description: str, parts: int) -> Link:
    """The link of ranks joined by gloo, whose threads share their cores if the machine has no others.

    Args:
        parts: how many parts of `SIZES` it carries in an exchange: all of them if one bus joins all ranks, or those
            that a rank receives if each rank has a port of its own.
    """
    latency, bandwidth = _figures([each.seconds for each in seen], SIZES, parts)
    late_latency, late_bandwidth = _figures([each.late for each in seen], LATE_SIZES, parts)
    figures = ["latency", "bandwidth", "late_latency", "late_bandwidth", "busy_latency"]
    core_latency = core_bandwidth = 0.0
    if _cores() <= len(seen):
        core_latency, core_bandwidth = _figures([each.cores for each in seen], SIZES, 2 * (WORLD - 1))
        figures += ["core_latency", "core_bandwidth"]
    return Link(
        name,
        description,
        "bus" if parts > WORLD - 1 else "ports",
        latency,
        bandwidth,
        overtake=True,
        late_latency=late_latency,
        late_bandwidth=late_bandwidth,
        busy_latency=mean(each.busy for each in seen),
        core_latency=core_latency,
        core_bandwidth=core_bandwidth,
        sources=_sources(*figures),
    )


def _figures(seconds: list[tuple[float, float]], sizes: tuple[int, int], parts: int) -> tuple[float, float]:
    """Seconds of a small message, and bytes per second of parts of such sizes, of the mean of the ranks."""
    small, large = (mean(each[size] for each in seconds) for size in range(2))
    return small, parts * (sizes[1] - sizes[0]) / max(large - small, 1e-9)


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sources(*figures: str) -> dict[str, str]:
    return dict.fromkeys(figures, SOURCE)


def _measured(variables: Mapping[str, str]) -> list[Measured]:
    """What each rank measures."""
    found = map(json.loads, run_ranks("fxpass.predict.link_rank", (), WORLD, TIMEOUT, variables))
    pairs = ("seconds", "late", "cores")
    return [Measured(**each | {name: tuple(each[name]) for name in pairs}) for each in found]
