"""Results of commands: to standard output, or to a file that is complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from ..inspect.files import is_special, replacing


def check(path: Path | None) -> None:
    """Raises `ValueError` if no file can be written at `path`, before anything takes time."""
    if path is None or path == Path("-"):
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise ValueError(f"no permission to write to {path}")
        return
    folder = next(each for each in path.resolve().parents if each.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission to write to {folder}")


def write(path: Path | None, content: str | bytes) -> None:
    """Write a text (or bytes as they are) to a file, or to standard output if `path` is None or `-`.

    The file appears when all of it is written: an interrupted command leaves the old one, or none.
    """
    if path is None or path == Path("-"):
        typer.echo(content, nl=isinstance(content, str))
        return
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
