"""Check the model before a capture, and restore it after a failed one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .errors import CaptureError
from .kinds import argument_names, mutates
from .left import OF_EVERY_MODULE, State
from .reach import module_places, walk

#: classes of hooks that replace weights while the model runs -> what switched them on
_MOVES_WEIGHTS = {
    "AlignDevicesHook": "offloading (device_map, enable_sequential_cpu_offload or cpu_offload)",
    "CpuOffload": "offloading of whole models (enable_model_cpu_offload)",
    "GroupOffloadingHook": "group offloading (enable_group_offload)",
    "LazyPrefetchGroupOffloadingHook": "group offloading (enable_group_offload)",
    "LayerwiseCastingHook": "layerwise casting (enable_layerwise_casting)",
}


def check_model(model: nn.Module) -> None:
    """Raises `CaptureError` if the weights are not plain tensors on one device, or a hook would move them."""
    for place, module in module_places(model):
        for name, value in vars(module).items():
            for where, inside in walk(place.then(name), value, set(), 5) if name not in OF_EVERY_MODULE else ():
                kind = type(inside).__name__
                if kind in _MOVES_WEIGHTS and getattr(inside, "offload", True):
                    raise CaptureError(
                        f"{_MOVES_WEIGHTS[kind]} moves the weights of {place.name or 'the model'} while it runs (a "
                        f"{kind} at {where.name}), but every rank keeps its weights in place; load the model without "
                        "it, on one device and in one dtype, or remove the hook, before the first call"
                    )
    devices: dict[torch.device, str] = {}
    without_values = ""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not is_lazy(tensor) and tensor.ndim:
            devices.setdefault(tensor.device, name)
            if tensor.is_meta and not isinstance(tensor, FakeTensor):
                without_values = without_values or name
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(f"the model's weights are on several devices ({where}); move them to one")
    if without_values:
        raise CaptureError(f"{without_values} is on the meta device and has no values; load the weights first")


def names_of(model: nn.Module) -> dict[int, tuple[str, str]]:
    """id of each tensor that the model holds -> (kind, qualified name); tied weights have their first name.

    A weight that is made of other tensors (a quantised one of whole numbers and scales) is named, and so are they.
    """
    names: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                for inner, part in parts(tensor):
                    names.setdefault(id(part), ("weight", prefix + name + inner))
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                names.setdefault(id(value), ("constant", prefix + name))
    return names


def parts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor and the tensors that it is made of, each with its path: "", ".codes", ".codes.inner"."""
    yield "", tensor
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            for inner, part in parts(getattr(tensor, name)):
                yield f".{name}{inner}", part


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[tuple[State, Writes]]:
    """If capture fails, restore Python state, and all tensors with their values.

    `Writes` must be active while the model itself runs.
    """
    state = State(model)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]
    tensors += [tensor for tensor in state.tensors() if not isinstance(tensor, nn.Parameter) and not is_lazy(tensor)]
    data = [(tensor, tensor.data) for tensor in tensors if type(tensor) is not FakeTensor]
    writes = Writes(tensors)
    try:
        yield state, writes
    except BaseException:
        state.reset()
        for tensor, before in data:
            if (tensor.device, tensor.dtype) != (before.device, before.dtype) or tensor.data_ptr() != before.data_ptr():
                tensor.data = before
        writes.undo()
        raise


class Writes(TorchDispatchMode):
    """Copies each of `tensors` before an operator writes to it for the first time."""

    supports_higher_order_operators = True

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._held: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            for _, part in parts(tensor):
                if not is_traceable_wrapper_subclass(part) and not isinstance(part, FakeTensor):
                    self._held.setdefault(part.untyped_storage()._cdata, []).append(part)
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(op, OpOverload) and mutates(op):
            named = zip(op._schema.arguments, args, strict=False)
            written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
            written += [kwargs[a.name] for a in op._schema.arguments if a.is_out and a.name in kwargs]
            self._copy(written)
        elif isinstance(op, OpOverload) and "running_mean" in argument_names(op):  # writes to it, unlike its schema
            self._copy([args, kwargs])
        return op(*args, **kwargs)

    def _copy(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                held = self._held.pop(tensor.untyped_storage()._cdata, ())
                self._copies += [(each, each.detach().clone()) for each in held]

    def undo(self) -> None:
        for tensor, copy in self._copies:
            tensor.detach().copy_(copy)
