"""Objects as trees of their parts: instances with attributes, functions with closures, bound methods, partials.

To a pytree such objects are leaves. `flatten` opens those that hold tensors; unflattening makes new objects with other
tensors in the same places.
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
FUNCTIONS = (FunctionType, MethodType, functools.partial)
UNSEEN = type("Unseen", (), {})()  #: replaces what is not visible in `state_of`
_HEAP_TYPE = 1 << 9  #: a flag of types: made by a `class` statement


class _Instance:
    """Has the size of all instances of classes without slots and built-in bases."""


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
    """The parts from which `build` makes an object again; None for containers and for objects that cannot be made."""
    if type(value) in FUNCTIONS:
        return function_parts(value)
    return vars(value) if is_open(value) else None


def function_parts(value: Any) -> dict[str, Any]:
    """The closure, defaults and attributes of a function; the parts of a bound method or a partial."""
    if isinstance(value, MethodType):
        return {"__self__": value.__self__, "__func__": value.__func__}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    cells = {name: content for name, cell in cells_of(value).items() for content in _contents(cell)}
    rest = {name: getattr(value, name) for name in ("__defaults__", "__kwdefaults__", "__dict__")}
    return cells | {name: part for name, part in rest.items() if part}


def cells_of(function: FunctionType) -> dict[str, CellType]:
    """The variables of other functions that a function uses, by name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()  # nothing was assigned yet


@dataclass(frozen=True)
class _Kind:
    """Type of an object, with the code and globals of a function."""

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
    """Compares an object by identity, and keeps it alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Opened:
    """An object as a node of a pytree. Unflattening it returns an object of its kind."""

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
    """`tree_flatten` that also opens dataclasses, and objects that hold tensors."""
    return pytree.tree_flatten(opened(value, is_leaf), is_leaf=is_leaf)


def opened(value: Any, is_leaf: Callable[[Any], bool] | None = None, above: tuple[int, ...] = ()) -> Any:
    """Replace each object in `value` that holds tensors by a node of the tree."""

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
    """Yield `value` and everything in it, at any depth. Modules are not opened."""
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


_NOT_OWN = ("__dict__", "__weakref__")  #: slots that Python itself fills


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object in its `__dict__` and in its slots."""
    slots = [vars(kind).get("__slots__") or () for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    held = {name: getattr(value, name) for name in names if name not in _NOT_OWN and hasattr(value, name)}
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
    """The values inside an object, down to `depth` levels, as hashable data; `UNSEEN` replaces what is not visible."""
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
