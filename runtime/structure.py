"""Notice cheaply that a model is no longer the one that was captured.

A program bakes in everything but the values of weights and inputs: which modules there are, shapes, processors, scales.
`Structure` remembers the model's own state and its classes', three levels into plain containers and objects, and
compares it in C: about a microsecond per module. Only where something differs is the difference looked at: other
*values* of parameters (replaced tensors of the same shape) are no change, a new adapter, another processor or another
scale is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DEPTH = 3
_IRRELEVANT = (
    "_backward",
    "_state_dict",
    "_load_state",
    "_is_full_backward",
    "_non_persistent",
    "__annotat",
)  #: how names begin that mean nothing to a forward call
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_OPAQUE = (nn.Module, Tensor, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


class Structure:
    """The structure of `model` now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.description = _describe(model)
        self._snapshot()

    def untouched(self) -> bool:
        """Whether no attribute was set since; False says only that a closer look is needed."""
        try:
            return self._live == self._copies
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays that are not the same object do not compare
            return False

    def refresh(self) -> bool:
        """Look closely, and take what is there as the new state. Whether the structure is still the same."""
        description = _describe(self.model)
        same = description == self.description
        self.description = description
        self._snapshot()
        return same

    def _snapshot(self) -> None:
        seen: set[int] = set()
        self._live: list[Any] = []
        for state in [vars(each) for each in (*_classes(self.model), *self.model.modules())]:
            self._live.append(state)
            for name, value in state.items():
                inner = None if name.startswith(_IRRELEVANT) else _inside(value)
                if inner is not None:
                    _collect(inner, DEPTH - 1, seen, self._live)
        self._copies = [type(live)(live) if isinstance(live, (list, set)) else dict(live) for live in self._live]


def _classes(model: nn.Module) -> list[type]:
    """The classes of a model's modules, but for torch's own: their attributes are the modules' too."""
    kinds = dict.fromkeys(base for kind in {type(m): None for m in model.modules()} for base in kind.__mro__)
    return [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]


class WeightTable:
    """Weights by qualified name, looked up in their modules at each call and never copied.

    What follows a weight's own name leads to a tensor that the weight is made of.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._entries: list[tuple[dict[str, Any], str, list[str]]] = []
        for name in names:
            module: Any = model
            first, *rest = name.split(".")
            while first in module._modules:
                module = module._modules[first]
                first, *rest = rest
            self._entries.append((module._parameters if first in module._parameters else module._buffers, first, rest))

    def tensors(self) -> list[Tensor]:
        return [reduce(getattr, rest, holder[first]) for holder, first, rest in self._entries]


def _collect(live: Any, depth: int, seen: set[int], found: list[Any]) -> None:
    """Add `live` and the dicts, lists, sets and object states inside it, each once."""
    if id(live) in seen:
        return
    seen.add(id(live))
    found.append(live)
    if depth:
        for value in live.values() if isinstance(live, dict) else live:
            inner = _inside(value)
            if inner is not None:
                _collect(inner, depth - 1, seen, found)


def _inside(value: Any) -> Any:
    """What of a value can change while the value stays the same object."""
    if isinstance(value, (*_PLAIN, *_OPAQUE)):
        return None
    if type(value) in (dict, list, set) or isinstance(value, dict):
        return value
    return getattr(value, "__dict__", None)


class _Same:
    """Equal only to the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def _describe(model: nn.Module) -> list[Any]:
    description: list[Any] = []
    for kind in _classes(model):
        state = {name: value for name, value in vars(kind).items() if not name.startswith(_IRRELEVANT)}
        description.append((kind, _plain(state, DEPTH)))
    first: dict[int, int] = {}  # a tensor that has two names is a weight of one name in a program
    for name, module in model.named_modules():
        state = dict(vars(module))
        tensors = [state.pop("_parameters"), state.pop("_buffers")]
        children = list(state.pop("_modules"))
        shapes = [(k, *_kind(t), first.setdefault(id(t), len(first))) for table in tensors for k, t in table.items()]
        description.append((name, type(module), children, shapes, _plain(state, DEPTH)))
    return description


def _kind(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    if is_lazy(tensor):
        return ("without a shape yet", tensor.dtype, tensor.device)
    inside: list[Any] = []
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        inside = [type(tensor), _plain(context, DEPTH), *(_kind(getattr(tensor, name)) for name in names)]
    return (tuple(tensor.shape), tensor.dtype, tensor.device, *inside)


def _plain(value: Any, depth: int) -> Any:
    """A value as comparable data, down to `depth`."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, _OPAQUE) or not depth:
        return _Same(value)
    if isinstance(value, dict):
        return [(key, _plain(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return _Same(value) if isinstance(value, frozenset) else set(value)
    state = getattr(value, "__dict__", None)
    return _Same(value) if state is None else (type(value), _plain(state, depth - 1))
