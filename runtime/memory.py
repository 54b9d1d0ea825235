"""Count memory before it is used: a process that touches more shared memory than there is dies without a message."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def check_shm(size: int, what: str) -> None:
    """Raises `OSError` if /dev/shm has not `size` bytes left for `what`."""
    state = os.statvfs("/dev/shm")
    free = state.f_bavail * state.f_frsize
    if size > free:
        raise OSError(
            f"{what} needs {_mib(size)} of shared memory, /dev/shm has {_mib(free)} left; make it larger (in a "
            "container: --shm-size)"
        )


def check_available(size: int, what: str, advice: str) -> None:
    """Raises `OSError` if this machine or container has not `size` bytes of memory left for `what`."""
    free = available()
    if free is not None and size > free:
        raise OSError(f"{what} needs {_mib(size)} of memory, {_mib(free)} are available; {advice}")


def check_gpu(size: int, device: torch.device, what: str, advice: str) -> None:
    """Raises `OSError` if a GPU has not `size` bytes of memory left for `what`."""
    free, _ = torch.cuda.mem_get_info(device)
    if size > free:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    if size > free:
        raise OSError(f"{what} needs {_mib(size)} of memory on {device}, {_mib(free)} are left; {advice}")


def available(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still get; None where Linux does not say.

    The least of what the machine has and what each control group of this process (a container, a job) leaves. What
    files have in the page cache counts as available.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    found = [_field(root / "proc/meminfo", "MemAvailable:", 1024)]
    groups = _text(root / "proc/self/cgroup").splitlines()
    for line in groups:
        if line.startswith("0::/"):
            top = root / "sys/fs/cgroup"
            group = top / line[len("0::/") :]
            found += [_left(folder) for folder in (group, *group.parents) if folder == top or top in folder.parents]
    return min((each for each in found if each is not None), default=None)


def _left(group: Path) -> int | None:
    """Bytes that a control group may still use; None if it has no limit."""
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return None
    return max(0, int(limit) - int(used) + (_field(group / "memory.stat", "inactive_file", 1) or 0))


def _field(file: Path, name: str, unit: int) -> int | None:
    for line in _text(file).splitlines():
        key, *values = line.split()
        if key == name:
            return int(values[0]) * unit
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
