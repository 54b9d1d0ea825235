"""Check that a refusal left a model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxpass.capture import CaptureError, capture


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds in attributes, containers, objects or closures, by name."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [(path, vars(module)) for path, module in model.named_modules()]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
            if is_traceable_wrapper_subclass(value):
                waiting += [(f"{name}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0]]
        elif id(value) not in seen and not isinstance(value, (nn.Module, ModuleType, type)):
            seen.add(id(value))
            waiting += [(f"{name}.{key}", item) for key, item in _inside(value).items()]


def _inside(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    cells = value.__closure__ or () if isinstance(value, FunctionType) else ()
    return dict(getattr(value, "__dict__", {})) | {f"cell {i}": cell.cell_contents for i, cell in enumerate(cells)}


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """Raises `AssertionError` if a refusal leaves another tensor in `model`, or another device, dtype or value."""
    before = {
        name: (tensor, tensor.device, tensor.dtype, tensor.detach().clone() if _has_values(tensor) else None)
        for name, tensor in tensors(model)
    }
    try:
        yield
    except Exception:
        after = dict(tensors(model))
        assert after.keys() == before.keys()
        for name, (tensor, device, dtype, value) in before.items():
            assert after[name] is tensor, name
            assert (tensor.device, tensor.dtype) == (device, dtype), name
            assert value is None or torch.equal(tensor, value), name
        raise


def refused(model: nn.Module, *args: Any, run: Callable[..., Any] = capture, **kwargs: Any) -> str:
    """The message of the refusal of a call, which leaves the model as it was."""
    with pytest.raises(CaptureError) as caught, unchanged_if_refused(model):
        run(model, *args, **kwargs)
    return str(caught.value)


def _has_values(tensor: Tensor) -> bool:
    """A tensor subclass that is made of others has its values in these."""
    plain = not isinstance(tensor, FakeTensor) and not is_traceable_wrapper_subclass(tensor)
    return plain and not tensor.is_meta and not is_lazy(tensor)
