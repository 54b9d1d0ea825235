"""From a model and example inputs to one functional ATen graph on whole tensors."""

from .arguments import arranged, check_memory, returned, unsplit
from .call import Call, Method, autocast, bind, passed
from .capture import capture, capture_call
from .drawn import DrawingCall, Draws
from .errors import CaptureError, DrawsError, GuardError, OtherDrawsError, TooManyOperatorsError
from .guards import broken_guard, guard_error, outdated, written

__all__ = [
    "Call",
    "CaptureError",
    "DrawingCall",
    "Draws",
    "DrawsError",
    "GuardError",
    "Method",
    "OtherDrawsError",
    "TooManyOperatorsError",
    "arranged",
    "autocast",
    "bind",
    "broken_guard",
    "capture",
    "capture_call",
    "check_memory",
    "guard_error",
    "outdated",
    "passed",
    "returned",
    "unsplit",
    "written",
]
