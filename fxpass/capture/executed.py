"""Note which of the user's functions run. Their globals and closures are state that the forward reads."""

from __future__ import annotations

import gc
import logging
import os
import sys
import sysconfig
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)
#: files whose functions read nothing that a user changes
_LIBRARIES = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(__file__) + os.sep,
    "<frozen",
    "<string>",
)
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_SITE = os.sep + "site-packages" + os.sep


_TRANSPARENT: set[CodeType] = set()
F = TypeVar("F", bound=Callable[..., Any])


def transparent(function: F) -> F:
    """Mark a function of this package that may run within a recorded call, and passes it on."""
    _TRANSPARENT.add(getattr(function, "__code__"))  # noqa: B009 - type checkers know no attributes of F
    return function


def is_library(code: CodeType) -> bool:
    """Whether a function is torch's, Python's own or this package's."""
    if code in _TRANSPARENT:
        return True
    file = code.co_filename
    return file.startswith(_LIBRARIES) or (file.startswith(_STANDARD) and _SITE not in file)


class Executed:
    """While it is active, notes each function that this thread calls, without those of libraries.

    Calls `begins(frame)` when a function starts for the first time, before its first statement.
    """

    def __init__(self, begins: Callable[[FrameType], None]) -> None:
        # the garbage collector calls its callbacks in the middle of anything: they are not part of the forward
        self._known: set[CodeType] = {each.__code__ for each in gc.callbacks if isinstance(each, FunctionType)}
        self._begins = begins

    def __enter__(self) -> Executed:
        self._active = sys.getprofile() is None
        if self._active:
            sys.setprofile(self._note)
        else:
            log.debug("a profiler is active, so the globals and closures that the model reads are not watched")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._active:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in self._known:
            self._known.add(code)
            if not is_library(code):
                self._begins(frame)
