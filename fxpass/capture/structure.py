"""Notice cheaply that a model is no longer the one that was captured.

A program bakes in everything but the values of weights and inputs: which modules there are, shapes, processors, scales.
`Structure` remembers the model's own state and its classes', three levels into plain containers, objects, closures and
partials, and compares it in C: about a microsecond per module. Only where something differs is the difference looked
at: other *values* of parameters (replaced tensors of the same shape) are no change, a new adapter, another processor or
another scale is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ir.program import Change
from .reach import classes_of
from .reads import ignored_by
from .watch import DEPTH, Snapshot

#: tables of a module's hooks around its forward
_HOOKS = {name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))}


class Structure:
    """The structure of `model` now, but for `changes`: what calls of its programs write to it.

    Args:
        hooks: whether programs hold the hooks of the model itself, that is, were captured by calling it.
    """

    def __init__(self, model: nn.Module, changes: Sequence[Change] = (), *, hooks: bool = True) -> None:
        self.model = model
        self._changes = list(changes)
        self._hooks = hooks
        self._look()

    def untouched(self) -> bool:
        """Whether no attribute was set since; False says only that a closer look is needed."""
        return self._snapshot.untouched()

    def refresh(self) -> bool:
        """Look closely, and take what is there as the new state. Whether the structure is still the same."""
        before = self.description
        self._look()
        return before == self.description

    def _look(self) -> None:
        ignored = ignored_by(self._changes)
        if not self._hooks:
            ignored[id(vars(self.model))] = (ignored.get(id(vars(self.model))) or set()) | _HOOKS
        self._snapshot = snapshot = Snapshot(ignored)
        kinds = classes_of(self.model)
        for kind in kinds:
            snapshot.add_table(vars(kind), 0)
            for value in vars(kind).values():
                if not isinstance(value, FunctionType):  # programs watch those that they ran
                    snapshot.add(value, DEPTH - 1)
        for module in self.model.modules():
            snapshot.add_table(vars(module))
            for table in (module._parameters, module._buffers, module._modules):
                snapshot.watch(table)
        self.description = [kinds, _modules(self.model), snapshot.describe()]


def _modules(model: nn.Module) -> list[Any]:
    """The modules by name, with the shapes of their tensors."""
    found: list[Any] = []
    first: dict[int, int] = {}  # a tensor that has two names is a weight of one name in a program
    for name, module in model.named_modules():
        tensors = [
            (key, *_kind(tensor), first.setdefault(id(tensor), len(first)))
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
        ]
        found.append((name, type(module), list(module._modules), tensors))
    return found


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


def _kind(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    if is_lazy(tensor):
        return ("without a shape yet", tensor.dtype, tensor.device)
    inside: list[Any] = []
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        snapshot = Snapshot({})
        snapshot.add(context)
        described = (snapshot.short(context), snapshot.describe())
        inside = [type(tensor), described, *(_kind(getattr(tensor, name)) for name in names)]
    return (tuple(tensor.shape), tensor.dtype, tensor.device, *inside)
