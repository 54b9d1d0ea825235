"""Find what a forward call leaves behind in Python state: attributes, lists and dicts that outlive the call.

`State` copies every table (dict, list, cell, class) that the forward can reach. After the recorded run it lists the
changes and undoes them. Tensors that the run put there become outputs of the program; a `Change` with a `Place` says
where each call puts them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any, TypeGuard

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ir.program import Change, Program
from .concrete import Reader
from .errors import CaptureError
from .reach import OPAQUE, Place, classes_of, entries, module_places, table_of, tensors_in, walk
from .recorder import Recorder

_HERE = os.path.dirname(__file__) + os.sep
#: attributes that every module has and that no forward writes to; hooks are not among them
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}


@dataclass
class _Saved:
    place: Place
    table: Any
    names: tuple[str, ...] | None  #: the only keys that count; None: all
    first: dict[Any, Any]  #: the contents before anything ran
    before: dict[Any, Any]  #: the contents before the recorded run

    def now(self) -> dict[Any, Any]:
        return _chosen(self.table, self.names)

    def put_back(self, contents: dict[Any, Any]) -> None:
        now = self.now()
        if now.keys() == contents.keys() and all(now[key] is value for key, value in contents.items()):
            return
        if self.names is not None:
            for name in self.names:
                self.table.pop(name, None)
            self.table.update(contents)
        elif isinstance(self.table, type):
            for name in [name for name in now if name not in contents]:
                delattr(self.table, name)
            for name in [name for name in contents if contents[name] is not now.get(name)]:
                setattr(self.table, name, contents[name])
        elif type(self.table) is CellType:
            self.table.cell_contents = contents.get("cell_contents")
        else:
            self.table.clear()
            if not isinstance(self.table, dict):
                self.table.extend(contents.values())
                return
            for key, value in contents.items():  # one by one: subclasses of dict may refuse `update`
                self.table[key] = value


def _chosen(table: Any, names: tuple[str, ...] | None) -> dict[Any, Any]:
    return entries(table) if names is None else {name: table[name] for name in names if name in table}


@dataclass(frozen=True)
class Put:
    """An entry of a table that the recorded run set to tensors, alone or in containers."""

    place: Place
    key: Any
    before: Any  #: the entry before the run
    after: Any
    table: list[Any] | None  #: if the table is a list, its contents before the run
    grown: int  #: number of entries that the list grew by


@dataclass
class Changes:
    """The changes that a recorded run made to Python state."""

    #: (place, tensor before the run, entry after it)
    replaced: list[tuple[str, Tensor, Any]] = field(default_factory=list)
    put: list[Put] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)  #: places of numbers that each run of the call changes


class State:
    """The tables that the forward of `model` can write to, with their contents.

    They are found by walking over the modules' attributes and hooks, and into closures, bound methods and partials.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.closures: set[CodeType] = set()  #: of those that ran, the ones whose closure can change
        self._tables: dict[Any, _Saved] = {}
        self.functions: list[FunctionType] = []  #: those that were found
        self.codes: dict[CodeType, dict[str, Any]] = {}  #: of the user's functions that ran -> the globals of each
        self._seen: set[int] = set()
        self.save()

    def save(self) -> None:
        """Copy the present contents of all known tables, and of those that the model has gained."""
        for saved in list(self._tables.values()):
            saved.before = saved.now()
        self._seen = set()
        for place, module in module_places(self._model):
            for table in (vars(module), module._parameters, module._buffers, module._modules):
                self._add(Place(place.name, table), table)
            for name, value in list(vars(module).items()):
                if name not in OF_EVERY_MODULE:
                    self.add(place.then(name), value)
        for kind in classes_of(self._model):
            self._add(Place(kind.__qualname__, kind), kind)
            for name, value in list(vars(kind).items()):
                self.add(Place(f"{kind.__qualname__}.{name}", value), value, 3)

    def add(self, place: Place, value: Any, depth: int = 8) -> None:
        """Also watch all tables inside `value`."""
        for where, inside in walk(place, value, self._seen, depth):
            if isinstance(inside, FunctionType):
                self.functions.append(inside)
            table = table_of(inside)
            if table is not None:
                self._add(where, table)

    def begins(self, frame: FrameType) -> None:
        """Also watch the globals and the closure of a function that is about to run.

        A variable of a function that is running for this call is not state: it ends with the call.
        """
        code, table = frame.f_code, frame.f_globals
        self.codes[code] = table
        names = tuple(name for name in code.co_names if name in table)
        self.add_names(Place(str(table.get("__name__")), table), table, names)
        if code.co_freevars:
            names = tuple(
                name for name in code.co_freevars if name in frame.f_locals and not _in_this_call(frame, name)
            )
            seen = {name: frame.f_locals[name] for name in names}
            for name, value in seen.items():
                self.add(Place(f"the variable {name} of {code.co_qualname}", (value,), (0,)), value)
            if not all(isinstance(value, (*OPAQUE, FunctionType)) for value in seen.values()):
                self.closures.add(code)

    def add_names(self, place: Place, table: dict[str, Any], names: tuple[str, ...]) -> None:
        """Also watch these names of a module's globals, and all tables inside their values."""
        self._add(place, table, names)
        for name in names:
            if name in table:
                self.add(Place(f"{place.name}.{name}", table, (name,)), table[name], 3)

    def _add(self, place: Place, table: Any, names: tuple[str, ...] | None = None) -> None:
        key = id(table) if names is None else (id(table), names)
        if key not in self._tables:
            contents = _chosen(table, names)
            self._tables[key] = _Saved(place, table, names, contents, contents)

    def tensors(self) -> list[Tensor]:
        """The tensors that a table holds."""
        return [
            each for saved in list(self._tables.values()) for each in saved.now().values() if isinstance(each, Tensor)
        ]

    def places(self, tensors: Sequence[Tensor]) -> list[tuple[Place, Tensor]]:
        """The places of those of `tensors` that a table holds."""
        wanted = {id(tensor): tensor for tensor in tensors}
        return [
            (saved.place if type(saved.table) is CellType else saved.place.then(key), wanted[id(value)])
            for saved in list(self._tables.values())
            for key, value in saved.now().items()
            if id(value) in wanted
        ]

    def undo(self) -> Changes:
        """Restore the contents at the last `save`; return the changes since."""
        changes = Changes()
        for saved in list(self._tables.values()):
            _compare(saved, saved.now(), changes)
        for saved in list(self._tables.values()):
            saved.put_back(saved.before)
        return changes

    def settle(self) -> None:
        """Restore numbers that a run changed and changed back with another rounding or type (`x * scale / scale`)."""
        for saved in list(self._tables.values()):
            for key, value in saved.now().items():
                first, number = saved.first.get(key), _number(value)
                if number is None or value is first or not is_number(first) or not _has_items(saved.table):
                    continue
                if same_number(first, number):
                    saved.table[key] = first

    def reset(self) -> None:
        """Restore the contents before anything ran."""
        for saved in list(self._tables.values()):
            saved.put_back(saved.first)

    def shorten(self, program: Program) -> None:
        """Shorten lists that grow with each call of `program` by the entries that the runs of this capture added."""
        for change in program.changes:
            if change.held is not None and change.grows is not None:
                table = table_of(change.held.value())
                saved = self._tables.get(id(table))
                if saved is not None and len(saved.first) < len(table):
                    del table[len(saved.first) :]


def _has_items(table: Any) -> bool:
    return not isinstance(table, (CellType, type))


def _in_this_call(frame: FrameType, name: str) -> bool:
    """Whether a variable of a closure belongs to a function that was called within the model's call."""
    caller = frame.f_back
    while caller is not None and not caller.f_code.co_filename.startswith(_HERE):
        if name in caller.f_code.co_cellvars and caller.f_locals.get(name) is frame.f_locals[name]:
            return True
        caller = caller.f_back
    return False


def _compare(saved: _Saved, new: dict[Any, Any], changes: Changes) -> None:
    table = list(saved.before.values()) if isinstance(saved.table, list) else None
    grown = max(0, len(new) - len(saved.before))
    for key in [*saved.before, *(key for key in new if key not in saved.before)]:
        before, after = saved.before.get(key), new.get(key)
        if before is after:
            continue
        name = saved.place.name if type(saved.table) is CellType else saved.place.then(key).name
        had, has = list(tensors_in(before)), list(tensors_in(after))
        changes.replaced += [(name, old, now) for old, now in zip_longest(had, has[: len(had)])]
        if any(isinstance(tensor, FakeTensor) for tensor in has):
            changes.put.append(Put(saved.place, key, before, after, table, grown))
        if is_number(before) and is_number(after) and not same_number(before, after):
            changes.counted.append(f"{name} ({before} before, {after} after)")


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float))


def same_number(one: float, other: float) -> bool:
    """Whether two numbers are equal to rounding: `x * s / s` is off by a unit in the last place."""
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-14))


def _number(value: Any) -> float | None:
    """The value of a number or of a 0-dim tensor."""
    if isinstance(value, Tensor):
        single = value.ndim == 0 and not value.is_complex() and not isinstance(value, FakeTensor) and not value.is_meta
        return value.item() if single else None
    return value if is_number(value) else None


def outputs_of(changes: Changes, recorder: Recorder, reader: Reader, ran: bool) -> list[tuple[Change, dict[Any, Any]]]:
    """The tensors that each call puts into Python state, as changes with their new entries.

    Args:
        ran: whether the model ran the same call before the recorded run. (Fake models do not.)

    Raises `CaptureError` if the model carries values from call to call: it reads an entry that the previous call set,
    or sets an entry in some calls only.
    """
    read = {id(origin.real): node for node, origin in recorder.origins.items() if origin.real is not None}
    if ran:
        _refuse_carried(changes, recorder, read)
    found: dict[Place, dict[Any, Any]] = {}
    lengths: dict[Place, int | None] = {}
    for put in changes.put:
        fixed = all(map(reader.is_constant, _nodes(put, recorder)))
        if fixed or _moved(put, recorder, read) or _put_back(put, recorder, reader):
            continue  # each call puts the same there
        if isinstance(put.place.root, type) and not put.place.keys:
            raise CaptureError(
                f"the model keeps a value of the call in its class, as {put.place.then(put.key).name}; "
                "keep it in an attribute of the module, where each call can put it anew"
            )
        if ran and not _every_call_does(put, read):
            raise CaptureError(
                f"the model keeps values from call to call in {put.place.then(put.key).name}; return them instead"
            )
        found.setdefault(put.place, {})[put.key] = put.after
        lengths[put.place] = None if put.table is None else len(put.table)
    return [(Change((), (), place, tuple(new), lengths[place]), new) for place, new in found.items()]


def _refuse_carried(changes: Changes, recorder: Recorder, read: dict[int, fx.Node]) -> None:
    """Raise for entries that a call reads and then replaces: they carry values from one call to the next."""
    if changes.counted:
        raise CaptureError(
            f"the model counts from call to call: {', '.join(changes.counted)}; pass the number in as an argument"
        )
    for place, old, new in changes.replaced:
        node = read.get(id(old))
        # a move to the device where it is already changes nothing
        if node is not None and (new is None or recorder.node(new) is not node):
            raise CaptureError(f"the model changes its own state while it runs: {place} is read, then replaced")
        if new is None:
            raise CaptureError(f"the model keeps values in {place} in some calls only; keep one in each, or in none")


def _nodes(put: Put, recorder: Recorder) -> list[fx.Node]:
    return [recorder.node(tensor) for tensor in tensors_in(put.after) if isinstance(tensor, FakeTensor)]


def _moved(put: Put, recorder: Recorder, read: dict[int, fx.Node]) -> bool:
    """Whether the tensors are the previous ones, after a move to their own device."""
    had, has = list(tensors_in(put.before)), list(tensors_in(put.after))
    return len(had) == len(has) and all(
        old is new or recorder.find(new) is read.get(id(old), 0) for old, new in zip(had, has, strict=True)
    )


def _put_back(put: Put, recorder: Recorder, reader: Reader) -> bool:
    """Whether a number was changed by an argument and then changed back, up to rounding."""
    if not is_number(put.before) or not isinstance(put.after, Tensor) or put.after.ndim:
        return False
    value = reader.value(recorder.node(put.after))
    return value is not None and same_number(float(put.before), float(value))


def _every_call_does(put: Put, read: dict[int, fx.Node]) -> bool:
    """Whether the eager run of the same call set an equal entry, and nothing reads it."""
    before = put.before
    if put.table is not None:
        if any(id(each) in read for each in put.table):
            return False
        if put.key >= len(put.table):
            before = put.table[put.key - put.grown] if put.key >= put.grown else None
    had, has = ([(t.shape, t.dtype) for t in tensors_in(value)] for value in (before, put.after))
    return had == has
