"""Notice cheaply that Python state is no longer what it was: compare tables in C, look closely where they differ."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from operator import attrgetter, itemgetter
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from .reach import OPAQUE

DEPTH = 5  #: levels of containers and objects that are looked into
#: how names of attributes begin that mean nothing to a forward call, or that `structure` looks at by itself
IRRELEVANT = ("_backward", "_state_dict", "_load_state", "_is_full_backward", "_non_persistent", "__annotat")
IRRELEVANT += ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_OPAQUE = (nn.Module, *OPAQUE)
_FUNCTIONS = (FunctionType, MethodType, functools.partial)

#: id of a table -> the keys that the watched program writes to itself; None: all
Ignored = Mapping[int, "set[Any] | None"]


class Snapshot:
    """Tables (dicts, lists, sets), variables of closures and arrays, as they were."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored
        self._order: dict[int, int] = {}  #: id of everything that was added -> its place
        self._added: list[Any] = []
        self._live: list[Any] = []
        self._copies: list[Any] = []
        self._skipped: list[tuple[Any, Any, Any]] = []  #: (table, its copy, a key that may differ)
        self._cells: list[CellType] = []
        self._contents: list[Any] = []
        self._functions: list[FunctionType] = []
        self._made: list[Any] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def add(self, value: Any, depth: int = DEPTH) -> None:
        """Remember what of `value` can change while it stays the same object, and what it leads to."""
        if isinstance(value, (*_PLAIN, *_OPAQUE)) or id(value) in self._order:
            return
        if self._ignored.get(id(value), ()) is None:
            return
        if isinstance(value, np.ndarray):
            self._note(value)
            self._arrays.append((value, value.copy()))
        elif isinstance(value, _FUNCTIONS):
            self._note(value)
            self._add_function(value, depth)
        elif isinstance(value, tuple):
            self._note(value)
            for item in value if depth else ():
                self.add(item, depth - 1)
        elif type(value) in (list, set) or isinstance(value, Mapping):
            self.add_table(value, depth)
        elif (state := getattr(value, "__dict__", None)) is not None:
            self._note(value)
            self.add_table(state, depth)

    def add_table(self, table: Any, depth: int = DEPTH) -> None:
        """Remember what a table holds; with `depth`, also what this leads to."""
        self._note(table)
        keys = self._ignored.get(id(table)) or ()
        self.watch(table, keys)
        items = table.items() if isinstance(table, Mapping) else enumerate(table)
        for key, item in items if depth else ():
            if key not in keys and not _is_irrelevant(key):
                self.add(item, depth - 1)

    def watch(self, table: Any, skipped: Iterable[Any] = ()) -> None:
        """Notice that a table is touched, but leave it out of the description."""
        copy = type(table)(table) if isinstance(table, (list, set)) else dict(table)
        self._live.append(table)
        self._copies.append(copy)
        self._skipped += [(table, copy, key) for key in skipped]

    def _note(self, value: Any) -> None:
        self._order[id(value)] = len(self._added)
        self._added.append(value)

    def _add_function(self, function: Any, depth: int) -> None:
        if isinstance(function, FunctionType):
            self._functions.append(function)
            self._made.append(_made(function))
        for part in parts_of(function):
            if type(part) is not CellType:  # what a function was given is as near as the function itself
                self.add(part, depth + 1 if isinstance(part, (dict, tuple)) else depth)
            elif self._ignored.get(id(part), ()) is not None and id(part) not in self._order:
                self._note(part)
                self._cells.append(part)
                self._contents.append(_content(part))
                self.add(_content(part), depth)

    def untouched(self) -> bool:
        """Whether nothing was set since; False says only that a closer look is needed."""
        for table, copy, key in self._skipped:
            if key in table:
                copy[key] = table[key]
            else:
                copy.pop(key, None)
        try:
            return (
                self._live == self._copies
                and list(map(_made, self._functions)) == self._made
                and list(map(_content, self._cells)) == self._contents
                and all(_same_array(array, copy) for array, copy in self._arrays)
            )
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays that are not the same object do not compare
            return False

    def describe(self) -> list[Any]:
        """All that was added, as it is now, as data that compares equal where a forward would do the same."""
        return list(map(self._described, self._added))

    def _described(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return (value.shape, str(value.dtype), value.tobytes())
        if type(value) is CellType:
            return self.short(_content(value))
        if isinstance(value, _FUNCTIONS):
            code = value.__code__ if isinstance(value, FunctionType) else type(value)
            return (code, [self.short(part) for part in parts_of(value)])
        if isinstance(value, Mapping):
            keys = self._ignored.get(id(value)) or ()
            return [(k, self.short(v)) for k, v in value.items() if k not in keys and not _is_irrelevant(k)]
        if isinstance(value, (list, tuple)):
            return list(map(self.short, value))
        return set(value) if isinstance(value, set) else (type(value), self.short(vars(value)))

    def short(self, value: Any) -> Any:
        """One value, by its number if it was added."""
        if isinstance(value, _PLAIN):
            return (type(value), value)
        if isinstance(value, nn.Module):
            return type(value)
        if self._ignored.get(id(value), ()) is None:
            return None
        place = self._order.get(id(value))
        return _Same(value) if place is None else ("what was added as number", place)


def _is_irrelevant(key: Any) -> bool:
    return type(key) is str and key.startswith(IRRELEVANT)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


_made = attrgetter("__code__", "__defaults__", "__kwdefaults__")


def _same_array(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def parts_of(function: Any) -> list[Any]:
    """What a function, bound method or partial was given when it was made: closure, defaults, object, arguments."""
    if isinstance(function, MethodType):
        return [function.__self__, function.__func__]
    if isinstance(function, functools.partial):
        return [function.func, function.args, function.keywords]
    given = (function.__defaults__, function.__kwdefaults__)
    return [*(function.__closure__ or ()), *(each for each in given if each is not None)]


class _Same:
    """Equal only to the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


class Names:
    """The values that a module or class has under some names, compared by a tuple in C."""

    def __init__(self, table: Mapping[str, Any], names: Iterable[str]) -> None:
        self.table = table
        self.names = tuple(names)
        self._get = itemgetter(*self.names)
        self._values = self._get(table)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self.table[name]) for name in self.names]

    def untouched(self) -> bool:
        try:
            return self._get(self.table) is self._values or self._get(self.table) == self._values
        except (KeyError, RuntimeError, ValueError, TypeError):
            return False
