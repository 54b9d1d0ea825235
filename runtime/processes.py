"""Look at the processes of other ranks on this machine. A stopped one (SIGSTOP) cannot say that it does not answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

State = Literal["runs", "stopped", "ended", "unknown"]
_PROC = Path("/proc")


def card() -> str:
    """What `state` needs to find this process: the machine since its start, the process namespace, the process."""
    stat = _stat(os.getpid())
    if stat is None:
        return ""
    return f"{_machine()}|{os.getpid()} {stat[1]}"


def state(of: str) -> State:
    """What a process does whose card is given.

    Returns:
        "unknown" if the process is on another machine or in another container, or if the system does not tell.
    """
    machine, _, place = of.partition("|")
    if not machine or machine != _machine():
        return "unknown"
    process, began = place.split()
    stat = _stat(int(process))
    if stat is None or stat[1] != began or stat[0] in "ZX":  # another process may have got the number
        return "ended"
    return "stopped" if stat[0] == "T" else "runs"


def is_stopped(process: int) -> bool:
    """Whether a process of this machine is stopped."""
    stat = _stat(process)
    return stat is not None and stat[0] == "T"


def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _stat(process: int) -> tuple[str, str] | None:
    """The state of a process, and when it began; None if there is no such process."""
    try:
        text = (_PROC / str(process) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], fields[19]
