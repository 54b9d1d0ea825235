"""A call of a model as flat tensors: what a program is captured for and what it is looked up by."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type, slice)


@dataclass(frozen=True)
class Call:
    """`model(*args, **kwargs)`, its arguments bound to the names of `forward` and flattened.

    Numbers travel as 0-dim tensors, so that a timestep that changes at every step does not ask for a new program;
    where the model needs the number itself, the program guards its value.
    """

    tensors: tuple[Tensor, ...]
    paths: tuple[str, ...]  #: what the caller calls each tensor, e.g. "added_cond_kwargs.time_ids"
    numbers: dict[int, float]  #: those of `tensors` that the caller gave as Python numbers
    key: tuple[Any, ...]  #: hashable; equal for calls that one program can serve, guards aside
    _spec: pytree.TreeSpec
    _leaves: tuple[Any, ...]
    _positional: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Raises `TypeError` as `model.forward` would if the arguments do not fit it, and `CaptureError` for objects
        that may hide tensors."""
        arguments, positional = _bind(model, args, kwargs)
        register_dataclasses(arguments)
        leaves, spec = pytree.tree_flatten_with_path(arguments)
        tensors: list[Tensor] = []
        paths: list[str] = []
        numbers: dict[int, float] = {}
        for path, leaf in leaves:
            if _is_number(leaf):
                numbers[len(tensors)] = leaf
                leaf = torch.tensor(leaf, dtype=torch.int64 if isinstance(leaf, int) else torch.float64, device="cpu")
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                paths.append(_text(path))
        plain = tuple(... if isinstance(leaf, Tensor) or _is_number(leaf) else leaf for _, leaf in leaves)
        kinds = tuple(_kind(_text(path), leaf) for path, leaf in leaves)
        return Call(tuple(tensors), tuple(paths), numbers, (spec, kinds, _autocast()), spec, plain, positional)

    def rebuild(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the same call with other tensors."""
        supply = iter(tensors)
        arguments = pytree.tree_unflatten([next(supply) if v is ... else v for v in self._leaves], self._spec)
        args: list[Any] = []
        for name in self._positional:
            value = arguments.pop(name)
            args.extend(value) if isinstance(value, tuple) and name == self._positional[-1] else args.append(value)
        return args, arguments

    def with_numbers(self, tensors: Sequence[Any]) -> list[Any]:
        """`tensors` with the caller's own numbers in their places."""
        return [self.numbers.get(i, tensor) for i, tensor in enumerate(tensors)]


def _bind(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments by name, and the names of those that must stay positional."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    parameters = signature.parameters
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    names = list(bound.arguments)
    if rest is not None and bound.arguments.get(rest):
        positional = tuple(names[: names.index(rest) + 1])  # names before *args must stay positional too
    else:
        positional = tuple(name for name in names if parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY)
    arguments = {name: value for name, value in bound.arguments.items() if name != rest or value}
    for name in names:
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name))
    return arguments, positional


def register_dataclasses(value: Any) -> None:
    """Let pytrees enter the dataclasses in `value` that nobody registered."""

    def register(leaf: Any) -> Any:
        kind = type(leaf)
        if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
            pytree.register_dataclass(kind)
            pytree.tree_map(register, leaf)
        return leaf

    pytree.tree_map(register, value)


def flatten_output(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """`tree_flatten` that also enters dataclasses nobody registered."""
    register_dataclasses(value)
    return pytree.tree_flatten(value)


def _is_number(leaf: Any) -> bool:
    return (type(leaf) is int and abs(leaf) < 2**63) or type(leaf) is float


def _autocast() -> tuple[Any, ...]:
    kinds = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def _kind(path: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", tuple(leaf.shape), leaf.dtype, leaf.device)
    if _is_number(leaf):
        return ("number", type(leaf))
    if isinstance(leaf, _PLAIN):
        return (type(leaf), (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf)
    if isinstance(leaf, np.ndarray) or _holds_tensors(leaf):
        raise CaptureError(
            f"the argument {path!r} is a {type(leaf).__name__}, whose tensors cannot be seen; pass tensors, or "
            "lists, tuples, dicts or dataclasses of them (other containers: torch.utils._pytree.register_pytree_node)"
        )
    state = _state(leaf)
    try:
        hash(leaf)
    except TypeError:
        if state is None:
            raise CaptureError(
                f"the argument {path!r} is a {type(leaf).__name__}, and nothing shows whether it changes from call to "
                "call; pass tensors, numbers, strings, or lists, tuples and dicts of them"
            ) from None
        return (type(leaf), state)
    try:
        return (type(leaf), weakref.ref(leaf), state)  # equal while both live and are equal; never a reused address
    except TypeError:
        return (type(leaf), leaf)


def _state(value: Any, depth: int = 3) -> Any:
    """What of an object a program has baked in, hashable, so many levels deep; None where nothing can be seen."""
    if isinstance(value, slice):
        return repr(value)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if not depth or isinstance(value, nn.Module):
        return None
    if isinstance(value, dict):
        return tuple((key, _state(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_state(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_state(item, depth - 1) for item in value)
    inner = getattr(value, "__dict__", None)
    return None if inner is None else (type(value), _state(dict(inner), depth - 1))


def _holds_tensors(leaf: Any) -> bool:
    if isinstance(leaf, nn.Module):
        return False
    return any(isinstance(v, Tensor) for v in pytree.tree_leaves(dict(getattr(leaf, "__dict__", {}))))


def _text(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
