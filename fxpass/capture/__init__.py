"""From a model and example inputs to one functional ATen graph on whole tensors."""

from .call import Call
from .export import CaptureError, capture, capture_call

__all__ = ["Call", "CaptureError", "capture", "capture_call"]
