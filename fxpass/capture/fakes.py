"""Fake results, known again by the operands' form: models repeat their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """Of a tensor, what the form of a result depends on: shape, stride, dtype, device."""

    data: tuple[Any, ...]


def form_of(value: Any) -> Any:
    """The form of tensors, and of anything around and beside them; hashable. 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        return Form((tuple(value.shape), value.stride(), value.dtype, value.device))
    if isinstance(value, (tuple, list)):
        return (type(value) if type(value) in (tuple, list) else tuple, *map(form_of, value))
    if isinstance(value, dict):
        return tuple((k, form_of(v)) for k, v in value.items())
    return (type(value).__name__, value)
