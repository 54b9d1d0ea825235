"""A call of a model as flat tensors: what a program is captured for and what it is looked up by."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type, slice)
UNSEEN = type("Unseen", (), {})()  #: of an object what nobody can look at


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
    arguments: dict[str, Any]  #: as the caller gave them, by name
    _spec: pytree.TreeSpec
    _leaves: tuple[Any, ...]
    _positional: tuple[str, ...]
    _alike: tuple[int, ...]  #: of each tensor the first place where the same one was given

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
        first: dict[int, int] = {}
        alike = tuple(first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors))  # `x is y` may be asked
        key = (spec, kinds, alike, _autocast(), positional)  # hooks see what was passed by position
        return Call(tuple(tensors), tuple(paths), numbers, key, arguments, spec, plain, positional, alike)

    def rebuild(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """The arguments of the same call with other tensors, one given twice being one; containers and objects are
        copies, for the model may write to them."""
        supply = iter([tensors[i] for i in self._alike])
        leaves = [next(supply) if v is ... else copied(v) for v in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)

    def run(self, model: nn.Module, arguments: dict[str, Any]) -> Any:
        """Call `model` with what `rebuild` returned, each argument by position or by name as the caller passed it."""
        named, args = dict(arguments), []
        for name in self._positional:
            value = named.pop(name)
            args.extend(value) if isinstance(value, tuple) and name == self._positional[-1] else args.append(value)
        return model(*args, **named)

    def refuse_gradients(self) -> None:
        """Raises `RuntimeError` if a tensor requires a gradient: no output will carry one."""
        path = next((path for path, tensor in zip(self.paths, self.tensors, strict=True) if tensor.requires_grad), None)
        if path is not None:
            raise RuntimeError(
                f"the input {path!r} requires a gradient, but a parallel module is for inference: its outputs carry no "
                "gradients; call it under torch.no_grad(), pass a detached tensor (.detach()), or use .unwrapped"
            )

    def functions(self) -> list[Any]:
        """Functions, bound methods and partials among the arguments."""
        return [leaf for leaf in self._leaves if isinstance(leaf, (FunctionType, MethodType, functools.partial))]

    def with_numbers(self, tensors: Sequence[Any]) -> list[Any]:
        """`tensors` with the caller's own numbers in their places."""
        return [self.numbers.get(i, tensor) for i, tensor in enumerate(tensors)]


def _bind(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments by name, and the names of those that were passed by position."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    parameters = signature.parameters
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    by_position = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = by_position[: len(args)] + ([rest] if rest is not None and bound.arguments.get(rest) else [])
    arguments = {name: value for name, value in bound.arguments.items() if name != rest or value}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments, tuple(positional)


def register_containers(value: Any) -> None:
    """Let pytrees enter the dataclasses in `value` that nobody registered, and the objects that hold tensors."""

    def register(leaf: Any) -> Any:
        kind = type(leaf)
        if kind in pytree.SUPPORTED_NODES:
            return leaf
        if dataclasses.is_dataclass(kind) and not isinstance(leaf, type):
            pytree.register_dataclass(kind)
        elif is_open(leaf) and _holds_tensors(leaf):
            _register_object(kind)
        else:
            return leaf
        pytree.tree_map(register, leaf)
        return leaf

    pytree.tree_map(register, value)


def is_open(leaf: Any) -> bool:
    """Whether what an object holds are its attributes and nothing else."""
    kind = type(leaf)
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    closed = (dict, list, tuple, set, frozenset, np.ndarray, nn.Module, Tensor)
    return hasattr(leaf, "__dict__") and not slots and not isinstance(leaf, closed) and not callable(leaf)


def copied(leaf: Any) -> Any:
    """A copy of an object that holds other things."""
    if isinstance(leaf, PLAIN) or not is_open(leaf) or not vars(leaf):
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
        value = (SimpleNamespace if issubclass(kind, SimpleNamespace) else object).__new__(kind)
        vars(value).update(zip(names, values, strict=True))
        return value

    pytree.register_pytree_node(kind, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)


def flatten_output(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """`tree_flatten` that also enters dataclasses and objects with tensors that nobody registered."""
    register_containers(value)
    return pytree.tree_flatten(value)


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
    if isinstance(leaf, PLAIN):
        return (type(leaf), (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf)
    if isinstance(leaf, np.ndarray) or _holds_tensors(leaf):
        raise CaptureError(
            f"the argument {path!r} is a {type(leaf).__name__}, whose tensors cannot be seen; pass tensors, or lists, "
            "tuples, dicts or objects with attributes (other containers: torch.utils._pytree.register_pytree_node)"
        )
    state = state_of(leaf)
    if is_open(leaf) and vars(leaf) and _all_seen(state):
        return (type(leaf), state)  # the model is given a copy, so that it cannot tell one from another
    try:
        hash(leaf)
    except TypeError:
        if state is UNSEEN:
            raise CaptureError(
                f"the argument {path!r} is a {type(leaf).__name__}, and nothing shows whether it changes from call to "
                "call; pass tensors, numbers, strings, or lists, tuples and dicts of them"
            ) from None
        return (type(leaf), state)
    try:
        return (type(leaf), weakref.ref(leaf), state)  # equal while both live and are equal; never a reused address
    except TypeError:
        return (type(leaf), leaf)


def state_of(value: Any, depth: int = 5) -> Any:
    """What of an object a program has baked in, hashable, so many levels deep; `UNSEEN` where there may be more."""
    if isinstance(value, slice):
        return repr(value)
    if isinstance(value, PLAIN):
        return (type(value), value)
    if not depth or isinstance(value, (Tensor, nn.Module)):
        return UNSEEN
    if isinstance(value, dict):
        return tuple((key, state_of(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(state_of(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(state_of(item, depth - 1) for item in value)
    if (inner := getattr(value, "__dict__", None)) is None:
        return UNSEEN
    seen = (type(value), state_of(dict(inner), depth - 1))
    return seen if is_open(value) else (UNSEEN, *seen)


def _all_seen(state: Any) -> bool:
    return state is not UNSEEN and (not isinstance(state, (tuple, frozenset)) or all(map(_all_seen, state)))


def _holds_tensors(leaf: Any, depth: int = 4) -> bool:
    if isinstance(leaf, Tensor):
        return True
    if isinstance(leaf, (nn.Module, *PLAIN)) or not depth:
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
