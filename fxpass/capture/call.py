"""A call of a model as flat tensors: what a program is captured for and what it is looked up by."""

from __future__ import annotations

import copy
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
        register_containers(arguments)
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
        """The arguments of the same call with other tensors; objects are copies, for the model may write to them."""
        supply = iter(tensors)
        leaves = [next(supply) if v is ... else _copied(v) for v in self._leaves]
        arguments = pytree.tree_unflatten(leaves, self._spec)
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


def register_containers(value: Any) -> None:
    """Let pytrees enter the dataclasses in `value` that nobody registered, and the objects that hold tensors."""

    def register(leaf: Any) -> Any:
        kind = type(leaf)
        if kind in pytree.SUPPORTED_NODES:
            return leaf
        if dataclasses.is_dataclass(kind) and not isinstance(leaf, type):
            pytree.register_dataclass(kind)
        elif _is_open(leaf) and _holds_tensors(leaf):
            _register_object(kind)
        else:
            return leaf
        pytree.tree_map(register, leaf)
        return leaf

    pytree.tree_map(register, value)


def _is_open(leaf: Any) -> bool:
    """Whether what an object holds are its attributes and nothing else."""
    kind = type(leaf)
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    closed = (dict, list, tuple, set, frozenset, np.ndarray, nn.Module, Tensor)
    return hasattr(leaf, "__dict__") and not slots and not isinstance(leaf, closed) and not callable(leaf)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, _PLAIN) or not _is_open(leaf) or not vars(leaf):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:
        return leaf  # what cannot be copied is no container


def _register_object(kind: type) -> None:
    def flatten(value: Any) -> tuple[list[Any], Any]:
        return list(vars(value).values()), tuple(vars(value))

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        return [(pytree.MappingKey(name), item) for name, item in vars(value).items()], tuple(vars(value))

    def unflatten(values: Any, names: Any) -> Any:
        value = object.__new__(kind)
        vars(value).update(zip(names, values, strict=True))
        return value

    pytree.register_pytree_node(kind, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)


def flatten_output(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """`tree_flatten` that also enters dataclasses and objects with tensors that nobody registered."""
    register_containers(value)
    return pytree.tree_flatten(value)


class Arguments:
    """What a call was made with, to see what the model wrote to it."""

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments
        self._before = self._leaves()
        self._states = {path: _state(leaf) for path, leaf in self._before.items() if hasattr(leaf, "__dict__")}

    def written(self) -> str | None:
        """The path of something that the model put there; what it took away is of no use to the caller."""
        for path, leaf in self._leaves().items():
            if path not in self._before:
                return path
            before = self._before[path]
            same = leaf is before or (type(leaf) is type(before) and isinstance(leaf, _PLAIN) and leaf == before)
            if not same or (path in self._states and _state(leaf) != self._states[path]):
                return path
        return None

    def _leaves(self) -> dict[str, Any]:
        register_containers(self._arguments)
        return {_text(path): leaf for path, leaf in pytree.tree_flatten_with_path(self._arguments)[0]}


def _is_number(leaf: Any) -> bool:
    return (type(leaf) is int and abs(leaf) < 2**63) or type(leaf) is float


def _autocast() -> tuple[Any, ...]:
    kinds = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def _kind(path: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)  # models may ask for strides
    if _is_number(leaf):
        return ("number", type(leaf))
    if isinstance(leaf, _PLAIN):
        return (type(leaf), (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf)
    if isinstance(leaf, np.ndarray) or _holds_tensors(leaf):
        raise CaptureError(
            f"the argument {path!r} is a {type(leaf).__name__}, whose tensors cannot be seen; pass tensors, or lists, "
            "tuples, dicts or objects with attributes (other containers: torch.utils._pytree.register_pytree_node)"
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


def _holds_tensors(leaf: Any, depth: int = 4) -> bool:
    if isinstance(leaf, Tensor):
        return True
    if isinstance(leaf, (nn.Module, *_PLAIN)) or not depth:
        return False
    inner = list(getattr(leaf, "__dict__", {}).values())
    names = [name for kind in type(leaf).__mro__ for name in _names(vars(kind).get("__slots__"))]
    inner += [getattr(leaf, name) for name in names if hasattr(leaf, name)]
    if isinstance(leaf, dict):
        inner += leaf.values()
    elif isinstance(leaf, (list, tuple, set, frozenset)):
        inner += leaf
    return any(_holds_tensors(item, depth - 1) for item in inner)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots or ())


def _text(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
