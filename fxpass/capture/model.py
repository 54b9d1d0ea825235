"""The user's model around a capture: what must hold of it before, and that it is the same afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

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


@dataclass
class Changes:
    """What a recorded run did to the model's attributes, before it was undone."""

    replaced: dict[int, str] = field(default_factory=dict)  #: id of a tensor that was assigned over -> qualified name
    grown: list[str] = field(default_factory=list)  #: lists and dicts that took up tensors of the run
    counted: list[str] = field(default_factory=list)  #: numbers that the same call changes each time


@contextmanager
def kept_as_it_is(model: nn.Module) -> Iterator[Changes]:
    """Undo what the recorded run assigns to modules (its tensors are fake); the changes are known afterwards."""
    before: list[tuple[str, Any, Any]] = []  # (qualified name, a dict or list, its contents)
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        before.append((prefix, vars(module), dict(vars(module))))
        before += [(prefix, vars(module)[table], dict(vars(module)[table])) for table in ("_parameters", "_buffers")]
        for name, value in vars(module).items():
            if type(value) in (dict, list) and not name.startswith("_"):
                before.append((prefix + name, value, value.copy()))
    changes = Changes()
    try:
        yield changes
    finally:
        for name, now, saved in before:
            _undo(name, now, saved, changes)


def _undo(name: str, now: Any, saved: Any, changes: Changes) -> None:
    if isinstance(saved, dict):
        same = now.keys() == saved.keys() and all(now[key] is value for key, value in saved.items())
        dropped = {key: value for key, value in saved.items() if now.get(key) is not value}
        values = list(now.values())
    else:
        same = len(now) == len(saved) and all(a is b for a, b in zip(now, saved, strict=True))
        dropped, values = {}, now
    if same:
        return
    changes.counted += [
        f"{name}{key} ({value} before, {now[key]} after)"
        for key, value in dropped.items()
        if isinstance(value, (int, float)) and isinstance(now.get(key), (int, float)) and now[key] != value
    ]
    changes.replaced |= {id(value): f"{name}{key}" for key, value in dropped.items() if isinstance(value, Tensor)}
    if (
        name
        and not name.endswith(".")
        and any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(list(values)))
    ):
        changes.grown.append(name)
    now.clear()
    now.update(saved) if isinstance(saved, dict) else now.extend(saved)
