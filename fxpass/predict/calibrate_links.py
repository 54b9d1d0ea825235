"""Measure what joins the processes of this machine: shared memory, and gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from torch.distributed import TCPStore

from ..passes.targets import Link, Medium
from ..runtime.local import HOST
from ..runtime.shared_memory import DISABLE
from .link_rank import SIZES, TIMEOUT

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
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT))
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    command = [sys.executable, "-P", "-m", "fxpass.predict.link_rank", str(store.port)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(WORLD)], stdout=subprocess.PIPE, env=environment, text=True)
        for rank in range(WORLD)
    ]
    try:
        printed = [each.communicate(timeout=TIMEOUT)[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    if any(each.returncode for each in ranks):
        raise RuntimeError("the processes that measure the link have failed; their errors are above")
    result = json.loads(printed[0])
    return result["shared"], tuple(result["seconds"])
