"""Objects as trees of their parts: instances with attributes, functions with closures, bound methods, partials.

Pytrees end at such objects. `flatten` goes on into those that hold tensors; unflattening gives new objects, which hold
other tensors in the same places.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type, slice)
UNSEEN = type("Unseen", (), {})()  #: stands for what cannot be looked into
_HEAP_TYPE = 1 << 9  #: a flag of types: made by a `class` statement


class _Instance:
    """An instance of a class without slots or built-in bases is as large as one of these."""


class _Namespace(SimpleNamespace):
    pass


def is_open(value: Any) -> bool:
    """Whether an object is an instance with attributes in a `__dict__` and holds nothing else."""
    kind = type(value)
    like = _Namespace if issubclass(kind, SimpleNamespace) else _Instance
    made = kind is SimpleNamespace or kind.__flags__ & _HEAP_TYPE
    plain = made and kind.__basicsize__ <= like.__basicsize__ and not kind.__itemsize__
    return bool(plain) and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, *PLAIN))


def parts_of(value: Any) -> dict[str, Any] | None:
    """The parts of an object that is not a container: what it must be given to be put together again."""
    if type(value) is FunctionType:
        names = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        cells = {name: content for name, cell in names for content in _contents(cell)}
        rest = {name: getattr(value, name) for name in ("__defaults__", "__kwdefaults__", "__dict__")}
        return cells | {name: part for name, part in rest.items() if part}
    if type(value) is MethodType:
        return {"__self__": value.__self__, "__func__": value.__func__}
    if type(value) is functools.partial:
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    return vars(value) if is_open(value) else None


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()  # nothing was assigned yet


@dataclass(frozen=True)
class _Kind:
    """What an object is besides its parts."""

    type: type
    names: tuple[str, ...]
    code: CodeType | None = None
    globals: _Same | None = None

    @staticmethod
    def of(value: Any, parts: dict[str, Any]) -> _Kind:
        if type(value) is FunctionType:
            return _Kind(FunctionType, tuple(parts), value.__code__, _Same(value.__globals__))
        return _Kind(type(value), tuple(parts))

    def build(self, values: Any) -> Any:
        """An object of this kind with other parts."""
        parts = dict(zip(self.names, values, strict=True))
        if self.code is not None and self.globals is not None:
            cells = (CellType(parts[name]) if name in parts else CellType() for name in self.code.co_freevars)
            function = FunctionType(self.code, self.globals.value, closure=tuple(cells))
            for name in ("__defaults__", "__kwdefaults__", "__dict__"):
                setattr(function, name, parts.get(name, {} if name == "__dict__" else None))
            return function
        if self.type is MethodType:
            return MethodType(parts["__func__"], parts["__self__"])
        if self.type is functools.partial:
            return functools.partial(parts["func"], *parts["args"], **parts["keywords"])
        value = (SimpleNamespace if issubclass(self.type, SimpleNamespace) else object).__new__(self.type)
        vars(value).update(parts)
        return value


class _Same:
    """Equal only to another one of the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Opened:
    """An object as a node of a pytree; what unflattening gives is the object itself."""

    def __init__(self, kind: _Kind, parts: dict[str, Any]) -> None:
        self.kind, self.parts = kind, parts


def _parts_with_keys(opened: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
    named: list[tuple[Any, Any]] = [(pytree.MappingKey(name), part) for name, part in opened.parts.items()]
    return named, opened.kind


pytree.register_pytree_node(
    _Opened,
    lambda opened: (list(opened.parts.values()), opened.kind),
    lambda values, kind: kind.build(values),
    flatten_with_keys_fn=_parts_with_keys,
)


def flatten(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], pytree.TreeSpec]:
    """`tree_flatten` that goes on into dataclasses and into objects that hold tensors."""
    return pytree.tree_flatten(opened(value, is_leaf), is_leaf=is_leaf)


def opened(value: Any, is_leaf: Callable[[Any], bool] | None = None, above: tuple[int, ...] = ()) -> Any:
    """`value` with every object in it that holds tensors as a node of the tree."""

    def enter(leaf: Any) -> Any:
        if isinstance(leaf, (Tensor, nn.Module, *PLAIN)) or (is_leaf is not None and is_leaf(leaf)):
            return leaf
        if dataclasses.is_dataclass(leaf) and type(leaf) not in pytree.SUPPORTED_NODES:
            pytree.register_dataclass(type(leaf))
            return opened(leaf, is_leaf, above)
        parts = parts_of(leaf)
        if not parts or id(leaf) in above or not holds_tensors(leaf):
            return leaf
        return _Opened(_Kind.of(leaf, parts), opened(parts, is_leaf, (*above, id(leaf))))

    return pytree.tree_map(enter, value, is_leaf=is_leaf)


def holds_tensors(value: Any) -> bool:
    return any(isinstance(each, Tensor) for each in walk(value))


def walk(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """`value` and what it holds, however deep. What modules hold is left out."""
    seen = set() if seen is None else seen
    if isinstance(value, PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, (Tensor, nn.Module, ModuleType)):
        return
    inner = list((parts_of(value) or _attributes(value)).values())
    if isinstance(value, dict):
        inner += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner += value
    for each in inner:
        yield from walk(each, seen)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds in its `__dict__` and in its slots."""
    slots = [vars(kind).get("__slots__") or () for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    held = {name: getattr(value, name) for name in names if name != "__dict__" and hasattr(value, name)}
    return held | dict(getattr(value, "__dict__", {}))


def copied(leaf: Any) -> Any:
    """A copy of an object with attributes. Modules in it stay the same objects."""
    if not is_open(leaf) or not vars(leaf):
        return leaf
    try:
        return copy.deepcopy(leaf, {id(each): each for each in walk(leaf) if isinstance(each, nn.Module)})
    except Exception:
        return leaf  # what cannot be copied is no container


def state_of(value: Any, depth: int = 5) -> Any:
    """The values that an object leads to, as hashable data, so many levels deep; `UNSEEN` where there may be more."""
    if isinstance(value, slice):
        return repr(value)
    if isinstance(value, PLAIN):
        return (type(value), value)
    if not depth or isinstance(value, (Tensor, nn.Module)):
        return UNSEEN
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, dict):
        return tuple((key, state_of(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(state_of(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(state_of(item, depth - 1) for item in value)
    parts = parts_of(value)
    inner = _attributes(value) if parts is None else parts
    if not inner and parts is None:
        return UNSEEN
    seen = (type(value), state_of(dict(inner), depth - 1))
    return seen if is_open(value) else (UNSEEN, *seen)


def all_seen(state: Any) -> bool:
    """Whether a state has no part that is `UNSEEN`."""
    return state is not UNSEEN and (not isinstance(state, (tuple, frozenset)) or all(map(all_seen, state)))
