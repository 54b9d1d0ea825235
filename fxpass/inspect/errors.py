"""Errors of views of a plan, without the packages that make them."""


class OnnxError(NotImplementedError):
    """A program has no form in ONNX; the message says which operator is the reason, and where it is."""
