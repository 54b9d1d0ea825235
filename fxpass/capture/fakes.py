"""Forms of tensors, the keys by which fake results are cached. Models repeat their blocks, so most are found there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """Shape, stride, dtype and device of a tensor."""

    data: tuple[Any, ...]


def form_of(value: Any) -> Any:
    """A hashable copy of `value` with a `Form` for each tensor. 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        return Form((tuple(value.shape), value.stride(), value.dtype, value.device))
    if isinstance(value, (tuple, list)):
        return (type(value) if type(value) in (tuple, list) else tuple, *map(form_of, value))
    if isinstance(value, dict):
        return tuple((k, form_of(v)) for k, v in value.items())
    return (type(value).__name__, value)
