"""What a model does to tensors outside the dispatcher: `.data`, `tolist`, `numpy`, autocast regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from .concrete import Reader
from .errors import CaptureError, model_line
from .recorder import Recorder

_VALUES = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Functions(TorchFunctionMode):
    """Active around the model together with the recorder."""

    def __init__(self, recorder: Recorder, reader: Reader, device: str) -> None:
        super().__init__()
        self._recorder = recorder
        self._reader = reader
        self._device = device
        self._has_autocast = torch.amp.is_autocast_available(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self._has_autocast:
            active = torch.is_autocast_enabled(self._device)
            self._recorder.autocast = (self._device, torch.get_autocast_dtype(self._device)) if active else None
        if func is Tensor.data.__get__:
            return args[0].detach()  # shares memory, so that what is written there is seen
        if func is Tensor.data.__set__:
            raise CaptureError(f"the model assigns to .data at {model_line()}; use copy_ or a new tensor")
        if func in _VALUES:
            node = self._recorder.node(self._recorder.fake(args[0]))
            with no_dispatch():
                return func(self._reader(node, shape_only=False), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))
