"""The warnings of this package."""

from __future__ import annotations

import inspect
import warnings

PASSED = ("fxpass", "torch")  #: packages that lie between a warning and the user's call


_speaks = True  #: whether this process warns


class FxpassWarning(UserWarning):
    """A call works, but slower or less exact than it may seem; the message says why, and what to do."""


def speak(whether: bool) -> None:
    """Say whether this process warns: of several that run the same script, the first one does."""
    global _speaks
    _speaks = whether


def warn(text: str) -> None:
    """Warn with an `FxpassWarning` that points to the line outside this package from which it was called.

    A process that is not the first rank of its group warns of nothing: all ranks meet the same.
    """
    if not _speaks:
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_passed(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, FxpassWarning, stacklevel=level)


def _is_passed(module: str) -> bool:
    return module.partition(".")[0] in PASSED and not module.startswith("fxpass.tools")
