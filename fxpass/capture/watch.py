"""Notice changes of Python state cheaply: compare tables in C, and describe values only where tables differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, itemgetter
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from .objects import FUNCTIONS
from .reach import OPAQUE, inner

DEPTH = 5  #: levels of containers and objects that are opened
#: how names of attributes begin that mean nothing to a forward call, or that `structure` looks at by itself
IRRELEVANT = ("_backward", "_state_dict", "_load_state", "_is_full_backward", "_non_persistent", "__annotat")
IRRELEVANT += ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_OPAQUE = (nn.Module, *OPAQUE)

#: id of a table -> the keys that the watched program writes to itself; None: all
Ignored = Mapping[int, "set[Any] | None"]


class Snapshot:
    """Copies of tables (dicts, lists, sets), of variables of closures, and of arrays."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored
        self._order: dict[int, int] = {}  #: id of each value that was added -> its index
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
        """Copy the contents of `value`, and of everything in it down to `depth` levels."""
        if isinstance(value, (*_PLAIN, *_OPAQUE)) or id(value) in self._order:
            return
        if self._ignored.get(id(value), ()) is None:
            return
        if isinstance(value, np.ndarray):
            self._note(value)
            self._arrays.append((value, value.copy()))
        elif isinstance(value, FUNCTIONS):
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
        """Copy a table, and everything in it down to `depth` levels."""
        self._note(table)
        keys = self._ignored.get(id(table)) or ()
        self.watch(table, keys)
        items = table.items() if isinstance(table, Mapping) else enumerate(table)
        for key, item in items if depth else ():
            if key not in keys and not _is_irrelevant(key):
                self.add(item, depth - 1)

    def watch(self, table: Any, skipped: Iterable[Any] = ()) -> None:
        """Copy a table, for `untouched` only: `describe` leaves it out."""
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
        for part in inner(function).values():
            if type(part) is not CellType:  # parts of a function count as one level with it
                self.add(part, depth + 1 if isinstance(part, (dict, tuple)) else depth)
            elif self._ignored.get(id(part), ()) is not None and id(part) not in self._order:
                self._note(part)
                self._cells.append(part)
                self._contents.append(_content(part))
                self.add(_content(part), depth)

    def untouched(self) -> bool:
        """Whether all copies are still equal. False may be wrong: then compare the results of `describe`."""
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
        """The present contents of everything added, as data. Equal data means that a forward behaves equally."""
        return list(map(self._described, self._added))

    def _described(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return (value.shape, str(value.dtype), value.tobytes())
        if type(value) is CellType:
            return self.short(_content(value))
        if isinstance(value, FUNCTIONS):
            code = value.__code__ if isinstance(value, FunctionType) else type(value)
            return (code, [self.short(part) for part in inner(value).values()])
        if isinstance(value, Mapping):
            keys = self._ignored.get(id(value)) or ()
            return [(k, self.short(v)) for k, v in value.items() if k not in keys and not _is_irrelevant(k)]
        if isinstance(value, (list, tuple)):
            return list(map(self.short, value))
        return set(value) if isinstance(value, set) else (type(value), self.short(vars(value)))

    def short(self, value: Any) -> Any:
        """Describe one value; a value that was added by its number."""
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


class _Same:
    """Compares an object by identity, and keeps it alive."""

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
