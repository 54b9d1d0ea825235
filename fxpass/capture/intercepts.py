"""Intercept what the dispatcher does not see: `.data`, `tolist`, `numpy`, autocast regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from .concrete import Reader
from .errors import CaptureError, model_line
from .recorder import Recorder
from .routing import Routing, has_counts

_VALUES = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_ASKED = {Tensor.numpy: "array", Tensor.item: "item", Tensor.__bool__: "bool"}
_SHAPES = {Tensor.shape.__get__, Tensor.size, Tensor.__len__, Tensor.numel}


class Intercepts(TorchFunctionMode):
    """Active around the model together with the recorder."""

    def __init__(self, recorder: Recorder, reader: Reader, routing: Routing, device: str) -> None:
        super().__init__()
        self._routing = routing
        self._recorder = recorder
        self._reader = reader
        self._device = device
        self._has_autocast = torch.amp.is_autocast_available(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self._has_autocast:
            active = torch.is_autocast_enabled(self._device)
            self._recorder.autocast = (self._device, torch.get_autocast_dtype(self._device)) if active else None
        if func == Tensor.data.__get__:  # a new object at each look-up
            return args[0].detach()  # shares memory, so that writes to it are seen
        if func == Tensor.data.__set__:
            raise CaptureError(f"the model assigns to .data at {model_line()}; use copy_ or a new tensor")
        if func in _SHAPES and (shape := self._routing.shape(args[0])) is not None:
            return _size(func, shape, *args[1:], **(kwargs or {}))
        args = self._routing.with_counts(func, args)
        if has_counts((args, kwargs or {})):
            return self._routing.call(func, args, kwargs or {})
        if func in _ASKED and self._routing.is_activation(args[0]):
            numbers = self._routing.numbers(args[0], _ASKED[func])
            if numbers is not None:
                return numbers
        if func in _VALUES:
            node = self._recorder.node(self._recorder.fake(args[0]))
            with no_dispatch():
                return func(self._reader(node, shape_only=False), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _size(func: Any, shape: tuple[Any, ...], dim: int | None = None) -> Any:
    """The result of a function of sizes for a shape with counts."""
    if func is Tensor.__len__:
        return shape[0]
    if func is Tensor.numel:
        total: Any = 1
        for size in shape:
            total = size * total
        return total
    return shape if dim is None else shape[dim]
