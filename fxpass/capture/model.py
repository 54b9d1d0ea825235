"""The user's model around a capture: what must hold of it before, and that it is the same afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import CaptureError


def check_model(model: nn.Module) -> None:
    """Raises `CaptureError` if the weights are not plain tensors on one device."""
    devices: dict[torch.device, str] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.ndim and not isinstance(tensor, nn.UninitializedParameter):
            devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(
            f"the model's weights are on several devices ({where}); move it to one, without offloading hooks"
        )


def names_of(model: nn.Module) -> dict[int, tuple[str, str]]:
    """id of each tensor that the model holds -> (kind, qualified name); tied weights have their first name."""
    names: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), ("weight", prefix + name))
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                names.setdefault(id(value), ("constant", prefix + name))
    return names


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give buffers back their values if capture fails: the eager warm-up of a model with state has changed them."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
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


@contextmanager
def kept_as_it_is(model: nn.Module) -> Iterator[dict[int, str]]:
    """Undo what the recorded run assigns to modules (its tensors are fake).

    Yields a dict that afterwards holds the replaced tensors: id -> qualified name.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before: list[tuple[str, nn.Module, dict[str, Any], dict[str, dict[str, Any]]]] = [
        (path, module, dict(vars(module)), {table: dict(vars(module)[table]) for table in tables})
        for path, module in model.named_modules()
    ]
    replaced: dict[int, str] = {}
    try:
        yield replaced
    finally:
        for path, module, attributes, contents in before:
            prefix = path + "." if path else ""
            for table, saved in (("", attributes), *contents.items()):
                now = vars(module)[table] if table else vars(module)
                for name, value in saved.items():
                    if now.get(name) is not value and isinstance(value, Tensor):
                        replaced[id(value)] = prefix + name
                if now.keys() != saved.keys() or any(now[name] is not value for name, value in saved.items()):
                    now.clear()
                    now.update(saved)
