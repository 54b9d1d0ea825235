"""The warnings of this package."""

from __future__ import annotations

import inspect
import os
import warnings

PASSED = ("fxpass", "torch", "contextlib")  #: what lies between a warning and the call of the user
TORCHRUN = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR"})  #: environment variables of a process that torchrun starts

_first: bool | None = None  #: whether this process is the first of some group of ranks; None if it is in none yet


class FxpassWarning(UserWarning):
    """A call works, but slower or less exact than it may seem; the message says why, and what to do."""


def joined(*, first: bool) -> None:
    """This process has joined a group of ranks that run the same script, as their first one or as another."""
    global _first
    _first = first or bool(_first)


def warn(text: str) -> None:
    """Warn with an `FxpassWarning` that points to the line outside this package from which it was called.

    Of processes that run the same script only the first one of each group of ranks warns, for all ranks meet the same.
    """
    first = _first
    if first is None:
        first = not os.environ.keys() >= TORCHRUN or os.environ["RANK"] == "0"
    if not first:
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_passed(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, FxpassWarning, stacklevel=level)


def _is_passed(module: str) -> bool:
    return module.partition(".")[0] in PASSED and not module.startswith("fxpass.tools")
