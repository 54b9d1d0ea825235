"""The Python state that a value leads to: containers, attributes, closures, defaults, bound methods, partials."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from logging import Logger
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..ir.program import Program
from .executed import is_library
from .objects import FUNCTIONS, cells_of, function_parts

#: Objects without state that a forward call changes, or with state that Python cannot inspect.
OPAQUE = (Tensor, type, ModuleType, BuiltinFunctionType, Logger)


def table_of(value: Any) -> Any:
    """The dict, list or cell that stores the contents of `value`; None if it has none."""
    if isinstance(value, (dict, list)) or type(value) is CellType:
        return value
    if isinstance(value, (*OPAQUE, FunctionType, MethodType)):
        return None
    state = getattr(value, "__dict__", None)
    return state if type(state) is dict else None


def entries(table: Any) -> dict[Any, Any]:
    """What a table holds now, by key. A class is a table of its attributes."""
    if isinstance(table, type):
        return {name: value for name, value in vars(table).items() if not name.startswith("__")}
    if type(table) is CellType:
        try:
            return {"cell_contents": table.cell_contents}
        except ValueError:  # empty
            return {}
    return dict(table) if isinstance(table, dict) else dict(enumerate(table))


def inner(value: Any) -> dict[Any, Any]:
    """The values one level inside `value`, by name, index or key. Modules are opaque: their owner walks over them.

    Functions, methods and partials have the entries of `function_parts`. The variables of a closure are cells, because
    other functions may write to them.
    """
    if isinstance(value, (*OPAQUE, nn.Module)):
        return {}
    if isinstance(value, FUNCTIONS):
        return function_parts(value) | (cells_of(value) if isinstance(value, FunctionType) else {})
    if isinstance(value, tuple):
        return dict(enumerate(value))
    table = table_of(value)
    return {} if table is None else entries(table)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a table is: a root that stays the same object, and the keys from there to the table."""

    name: str  #: for messages: "mid.processor.bank", "closure of hook at file.py:3: seen"
    root: Any
    keys: tuple[Any, ...] = ()

    def then(self, key: Any) -> Place:
        return Place(f"{self.name}{'.' if self.name else ''}{key}", self.root, (*self.keys, key))

    def value(self) -> Any:
        """Raises `KeyError` if nothing is there any more."""
        value = self.root
        for key in self.keys:
            value = (entries if isinstance(value, type) else inner)(value)[key]
        return value


def module_places(model: nn.Module) -> Iterator[tuple[Place, nn.Module]]:
    """Each module of `model` with the place of its attributes."""
    for path, module in model.named_modules():
        yield Place(path, vars(module)), module


def classes_of(model: nn.Module) -> list[type]:
    """The classes of a model's modules without torch's own. Modules inherit their attributes."""
    kinds = dict.fromkeys(base for kind in {type(m): None for m in model.modules()} for base in kind.__mro__)
    return [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]


def walk(place: Place, value: Any, seen: set[int], depth: int = 8) -> Iterator[tuple[Place, Any]]:
    """Yield `value` and everything in it that is not opaque, each once, with its place."""
    if depth < 0 or id(value) in seen or isinstance(value, (*OPAQUE, nn.Module, *_PLAIN)):
        return
    if isinstance(value, FunctionType) and is_library(value.__code__):
        return  # torch keeps counters of its own in closures
    seen.add(id(value))
    yield place, value
    for key, item in inner(value).items():
        if type(item) is CellType:
            code = value.__code__
            name = f"the variable {key} of {code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"
            yield from walk(Place(name, item), item, seen, depth - 1)
        elif type(value) is CellType:
            yield from walk(Place(place.name, value, (key,)), item, seen, depth - 1)
        else:
            yield from walk(place.then(key), item, seen, depth - 1)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield all tensors in `value`."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for item in inner(value).values():
            yield from tensors_in(item, seen)


def left_by(program: Program) -> list[Tensor]:
    """The tensors in the places that each call of `program` writes to, as the latest call left them."""
    found: list[Tensor] = []
    for change in program.changes:
        if change.held is not None:
            now = entries(table_of(change.held.value()))
            grown = [key for key in change.keys if change.grows is not None and key >= change.grows]
            for key in change.keys:
                found += tensors_in(now[len(now) - len(grown) + grown.index(key)] if key in grown else now[key])
    return found


_PLAIN = (int, float, complex, str, bytes, type(None))
