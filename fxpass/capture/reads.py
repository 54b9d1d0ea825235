"""The Python state outside the model that a program depends on: globals, closures, defaults, tensors in objects."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

from ..ir.garbage import unfreeze
from ..ir.program import Change
from .left import State
from .reach import table_of
from .watch import Names, Snapshot


def ignored_by(changes: Iterable[Change]) -> dict[int, set[Any] | None]:
    """By the id of a table, the keys that each call writes to; None: it appends to a list, or sets a variable."""
    found: dict[int, set[Any] | None] = {}
    for change in changes:
        if change.held is not None:
            table = table_of(change.held.value())
            keys = found.setdefault(id(table), set() if isinstance(table, dict) else None)
            if keys is not None:
                keys.update(change.keys)
    return found


class Reads:
    """The variables outside the functions that a forward ran, and the objects that hold tensors which it used.

    Args:
        state: the tables that the forward can reach, with the functions that ran.
        given: functions, bound methods and partials among the arguments of the call.
        tensors: constants of the program that are no attributes of a module.
        changes: the places that each call writes to.
    """

    def __init__(
        self, state: State, given: Sequence[Any], tensors: Sequence[Tensor], changes: Sequence[Change]
    ) -> None:
        self._tensors = state.places(tensors)
        self._changes = list(changes)
        self._functions = [*_functions(state), *given]
        self._tables = list(_tables(state.codes))
        self._look()

    def changed(self) -> bool:
        """Whether this state has changed, so that the program is invalid."""
        if any(place.value() is not tensor for place, tensor in self._tensors):
            return True
        if self._snapshot.untouched() and all(names.untouched() for names in self._names):
            return False
        before = self._description
        self._look()
        return self._description != before

    def _look(self) -> None:
        ignored = ignored_by(self._changes)
        self._snapshot = Snapshot(ignored)
        self._names: list[Names] = []
        for table, names in self._tables:
            left = [name for name in names if name in table and name not in (ignored.get(id(table)) or ())]
            if left:
                self._names.append(Names(table, left))
        values = [each for names in self._names for each in names.items()]
        for value in [*(value for _, value in values), *self._functions]:
            self._snapshot.add(value)
        self._description = [[(name, self._snapshot.short(value)) for name, value in values], self._snapshot.describe()]


def _tables(codes: dict[CodeType, dict[str, Any]]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The globals that functions use, and the attributes that they use of modules and classes among these."""
    tables: dict[int, tuple[Any, dict[str, None]]] = {}

    def add(table: Any, names: tuple[str, ...]) -> None:
        _, known = tables.setdefault(id(table), (table, {}))
        new = [name for name in names if name in table and name not in known]
        known.update(dict.fromkeys(new))
        for value in [table[name] for name in new]:
            if isinstance(value, (ModuleType, type)):
                kinds = (value,) if isinstance(value, ModuleType) else value.__mro__
                for each in kinds:
                    add(vars(each), names)

    for code, variables in codes.items():
        add(variables, code.co_names)
    return ((table, tuple(names)) for table, names in tables.values())


def _functions(state: State) -> list[FunctionType]:
    """The functions that ran, without those that another function creates at each run."""
    found = [each for each in state.functions if each.__code__ in state.codes]
    known = {each.__code__ for each in found}
    known |= {each for code in state.codes for each in code.co_consts if isinstance(each, CodeType)}
    others = state.closures - known
    if others:
        unfreeze()
        found += [each for each in gc.get_referrers(*others) if isinstance(each, FunctionType)]
    return found
