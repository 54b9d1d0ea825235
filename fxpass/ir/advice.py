"""The warnings of this package."""

from __future__ import annotations

import inspect
import warnings

PASSED = ("fxpass", "torch")  #: packages that lie between a warning and the user's call


class FxpassWarning(UserWarning):
    """A call works, but slower or less exact than it may seem; the message says why, and what to do."""


def warn(text: str) -> None:
    """Warn with an `FxpassWarning` that points to the line outside this package from which it was called."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_passed(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, FxpassWarning, stacklevel=level)


def _is_passed(module: str) -> bool:
    return module.partition(".")[0] in PASSED and not module.startswith("fxpass.tools")
