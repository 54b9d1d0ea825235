"""Pickles in which tensors are left out: whoever sends them says what stands in their place."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Pickler(pickle.Pickler):
    """Pickles to bytes; a tensor becomes what `tensor_id` returns.

    Args:
        reduce: as `pickle.Pickler.reducer_override`.
    """

    def __init__(self, tensor_id: Callable[[Tensor], Any], reduce: Callable[[Any], Any] | None = None) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensor_id = tensor_id
        self._reduce = reduce

    def pickled(self, value: Any) -> memoryview:
        self.dump(value)
        return self._buffer.getbuffer()

    def persistent_id(self, obj: Any) -> Any:
        return self._tensor_id(obj) if isinstance(obj, Tensor) else None

    def reducer_override(self, obj: Any) -> Any:
        return NotImplemented if self._reduce is None else self._reduce(obj)


class Unpickler(pickle.Unpickler):
    """Unpickles bytes; `tensor` makes a tensor of what stands in its place."""

    def __init__(self, data: Any, tensor: Callable[[Any], Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensor = tensor

    def persistent_load(self, pid: Any) -> Tensor:
        return self._tensor(pid)
