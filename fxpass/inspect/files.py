"""Files that are complete or not there."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a new file in the folder of `path`, which takes its place when the block ends.

    An error or an interrupt leaves the old file, or none. The folder is made if there is none. A link stays, and leads
    to the new file. A pipe or a device (`/dev/null`) stays, too: its own path is given, and takes what is written.
    """
    if is_special(path):
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.touch(exist_ok=False)
        if path.exists():
            part.chmod(path.stat().st_mode)
        yield part
        part.replace(path)
    except BaseException:  # Ctrl-C, too
        part.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the folder of `path` among all that call this, in other processes too; the folder is made if there is none.

    For files that are read, changed and replaced. File systems without such locks do without.
    """
    folder = path.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_special(path: Path) -> bool:
    """Whether there is something at `path` that no file may replace: a pipe, a socket, a device."""
    return path.exists() and not path.is_file() and not path.is_dir()
