"""The user's model around a capture: what must hold of it before, and that it is the same afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from logging import Logger
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import CaptureError


def check_model(model: nn.Module) -> None:
    """Raises `CaptureError` if the weights are not plain tensors on one device."""
    devices: dict[torch.device, str] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not is_lazy(tensor) and tensor.ndim:
            devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(
            f"the model's weights are on several devices ({where}); move it to one, without offloading hooks"
        )


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
    """A tensor and those that it is made of, with what leads to each: "", ".codes", ".codes.inner"."""
    yield "", tensor
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            for inner, part in parts(getattr(tensor, name)):
                yield f".{name}{inner}", part


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give buffers back their values if capture fails: the eager warm-up of a model with state has changed them."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    try:
        yield
    except Exception:
        for module, name, buffer, value in saved:
            if not isinstance(buffer, FakeTensor):
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        raise


@dataclass
class Changes:
    """What a recorded run did to what the model holds, before it was undone."""

    #: (place, a tensor that stood there, what stands there instead)
    replaced: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)  #: places that took up tensors of the run, and had none before
    counted: list[str] = field(default_factory=list)  #: numbers that the same call changes each time


@contextmanager
def kept_as_it_is(model: nn.Module) -> Iterator[Changes]:
    """Undo what the recorded run assigns (its tensors are fake) to modules, and to containers and objects that they
    hold, however deep; the changes are known afterwards."""
    before: list[tuple[str, Any, Any]] = []  # (place, a dict or list, its contents)
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        before += [(prefix, table, dict(table)) for table in (vars(module), module._parameters, module._buffers)]
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                before += _holders(prefix + name, value, seen)
    changes = Changes()
    try:
        yield changes
    finally:
        for place, now, saved in before:
            _undo(place, now, saved, changes)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
#: what holds no state of a model
_OPAQUE = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, Logger)


def _holders(place: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any, Any]]:
    """The dicts, lists and states of objects in `value`, each with a copy of its contents."""
    if id(value) in seen or isinstance(value, _OPAQUE):
        return
    seen.add(id(value))
    if isinstance(value, (dict, list)):
        yield place, value, value.copy()
    elif (state := getattr(value, "__dict__", None)) is not None and type(state) is dict:
        yield place + ".", state, state.copy()
    for key, inner in _items(value):
        yield from _holders(f"{place}.{key}", inner, seen)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    state = getattr(value, "__dict__", None)
    return list(state.items()) if type(state) is dict and not isinstance(value, _OPAQUE) else []


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in `value`."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for _, inner in _items(value):
            yield from _tensors(inner, seen)


def _undo(place: str, now: Any, saved: Any, changes: Changes) -> None:
    new, old = dict(_items(now)), dict(_items(saved))
    if new.keys() == old.keys() and all(new[key] is value for key, value in old.items()):
        return
    dot = "" if not place or place.endswith(".") else "."
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before is after:
            continue
        name = f"{place}{dot}{key}"
        had, has = list(_tensors(before, set())), list(_tensors(after, set()))
        changes.replaced += [(name, old, new) for old, new in zip_longest(had, has[: len(had)])]
        if not had and any(isinstance(tensor, FakeTensor) for tensor in has):
            changes.grown.append(name)
        if isinstance(before, (int, float)) and isinstance(after, (int, float)) and before != after:
            changes.counted.append(f"{name} ({before} before, {after} after)")
    now.clear()
    now.update(saved) if isinstance(saved, dict) else now.extend(saved)
