"""Errors of capture, and the source line of the model that an error is about."""

from __future__ import annotations

import os
import sys
import traceback
from types import FrameType

import torch

_NOT_THE_MODEL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<frozen", "<string>")
_HELPERS = ("contextlib.py", "functools.py")


class CaptureError(RuntimeError):
    """The model cannot be turned into one graph; the message says which operator, where, and what to do."""


class DrawsError(CaptureError):
    """A call draws random numbers."""


class OtherDrawsError(CaptureError):
    """A call draws other random numbers than an earlier call of its kind."""


class TooManyOperatorsError(CaptureError):
    """A call records more operators than are worth splitting.

    Attributes:
        repeated: paths of the modules that the call runs again and again, if most of its operators are theirs.
    """

    def __init__(self, message: str, repeated: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.repeated = repeated


class GuardError(RuntimeError):
    """The model turns an input that changes at every call into a Python number, so no two calls can share a program."""


def model_line() -> str:
    """`file:line in function` of the innermost running frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_THE_MODEL) and not file.endswith(_HELPERS):
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown line"


def raised_line(error: BaseException) -> str:
    """`file:line in function` of the model's innermost frame that an exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith(_NOT_THE_MODEL) and not frame.filename.endswith(_HELPERS):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return "unknown line"
