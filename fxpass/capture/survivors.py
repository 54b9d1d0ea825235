"""Values that outlive a recorded run, and tensors that an earlier call left behind."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterable
from sys import getrefcount
from types import CellType, FrameType, FunctionType, MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ir.garbage import unfreeze
from .errors import CaptureError

if TYPE_CHECKING:
    from .recorder import Recorder

_left_behind: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def mark_left_behind(tensors: Iterable[Tensor]) -> None:
    """Note that a call put these tensors into Python state. No program may use them as constants."""
    for tensor in tensors:
        _left_behind[id(tensor)] = tensor


def is_left_behind(tensor: Tensor) -> bool:
    return _left_behind.get(id(tensor)) is tensor


def refuse_survivors(recorder: Recorder) -> None:
    """Raises `CaptureError` if anything but the recorder holds a recorded value, after removing the value there."""
    if not _survivors(recorder):
        return
    unfreeze()
    gc.collect()
    _clear_caches(_survivors(recorder))
    survivors = _survivors(recorder)  # values in reference cycles and caches are gone by now
    found = _Holders(recorder, survivors)
    for tensor in survivors:
        if id(tensor) in found.first:
            node, place = recorder.node(tensor), found.describe(tensor)
            found.release()
            raise CaptureError(
                f"a tensor from {node.meta['trace'] or node.target} outlives the call in {place}; "
                "return it, or keep it in an attribute, a list or a dict of a module, where each call can put it anew"
            )


def release_survivors(recorder: Recorder) -> None:
    """Remove recorded values from each list, dict, set, cell, slot and `functools.lru_cache`."""
    if not _survivors(recorder):
        return
    unfreeze()
    _clear_caches(_survivors(recorder))
    _Holders(recorder, _survivors(recorder)).release()


def _clear_caches(survivors: list[Tensor]) -> None:
    """Clear every `functools.lru_cache` that holds one of `survivors` in a key or a result. Later calls fill it."""
    wanted = {id(value) for value in survivors}
    for cached in [each for each in gc.get_objects() if type(each) is _LRU_CACHE] if wanted else ():
        if _contains(cached, wanted):
            cached.cache_clear()


def _contains(cached: Any, wanted: set[int]) -> bool:
    """Whether a cache refers to an object with one of the ids `wanted`, directly or through up to four containers."""
    level, seen = [cached], set[int]()
    for _ in range(5):
        level = [each for each in gc.get_referents(*level) if id(each) not in seen]
        if any(id(each) in wanted for each in level):
            return True
        seen.update(map(id, level))
        level = [each for each in level if not isinstance(each, _NO_CONTAINERS)]
    return False


def _survivors(recorder: Recorder) -> list[Tensor]:
    """The recorded values with more references than those of the recorder."""
    held = list(recorder.holds())
    known = Counter(map(id, held))
    values: dict[int, Tensor] = {
        id(value): value for value in held if isinstance(value, FakeTensor) and not recorder.was_given(value)
    }
    del held[:]
    values[0] = torch.empty(0, device="meta")  # nothing else holds it
    counts = {key: getrefcount(value) - known[key] - _held_by_views(value) for key, value in values.items()}
    none = counts.pop(0)
    return [values[key] for key, count in counts.items() if count > none]


class _Holders:
    """What refers to recorded values, directly or through up to three objects that are no containers.

    Each level is one search of all objects of the process, however many values there are: large processes
    have millions of objects.
    """

    def __init__(self, recorder: Recorder, survivors: list[Tensor]) -> None:
        self.first: dict[int, Any] = {}  #: id of a value -> what was found first to hold it
        self._containers: list[Any] = []
        self._others: list[Any] = []  #: objects that are no containers, through which a value is held
        self._sources = {id(value): id(value) for value in survivors}  # id of what to remove -> of the value in it
        self._ours = recorder.containers() | {id(survivors), id(self.first), id(self._containers), id(self._others)}
        level: list[Any] = survivors
        for _ in range(4):
            level = self._above(level)

    def _above(self, level: list[Any]) -> list[Any]:
        """Store the containers that hold an object of `level`; return the other objects that do."""
        others: list[Any] = []
        referrers = gc.get_referrers(*level) if level else []
        self._ours |= {id(level), id(others), id(referrers)}
        inside = {id(each) for each in level}
        for holder in referrers:
            if id(holder) in self._ours or isinstance(holder, (FrameType, ModuleType)):
                continue
            held = [self._sources[id(each)] for each in gc.get_referents(holder) if id(each) in inside]
            for source in held:
                self.first.setdefault(source, holder)
            if isinstance(holder, (list, deque, dict, set, CellType)):
                self._containers.append(holder)
            elif held and id(holder) not in self._sources:
                self._sources[id(holder)] = held[0]
                others.append(holder)
        self._others += others
        return others

    def describe(self, value: Tensor) -> str:
        """What holds `value`, in words."""
        holder = self.first[id(value)]
        if isinstance(holder, (list, deque, dict, set, CellType)):
            return _describe(holder, value, self._ours)
        return f"a {type(holder).__name__}"

    def release(self) -> None:
        """Remove the values from containers and slots, and other objects that hold them from containers.

        Classes and Python modules lose no attribute: a value there becomes None, another object stays.
        """
        for other in self._others:
            if _empty_slots(other, self._sources):
                del self._sources[id(other)]
        spaces = self._namespaces()
        for holder in self._containers:
            if id(holder) not in spaces:
                _remove(holder, self._sources)
                continue
            for name in [name for name, value in holder.items() if self._sources.get(id(value)) == id(value)]:
                setattr(spaces[id(holder)], name, None)  # a write to a class's dict itself would leave Python's cache

    def _namespaces(self) -> dict[int, type | ModuleType]:
        """The classes and Python modules whose attributes are among the containers, by the id of that dict."""
        dicts = [each for each in self._containers if isinstance(each, dict)]
        owners = [each for each in gc.get_referrers(*dicts) if isinstance(each, (type, ModuleType))] if dicts else []
        return {
            id(each): owner for owner in owners for each in gc.get_referents(owner) if any(each is one for one in dicts)
        }


def _empty_slots(holder: Any, unwanted: Container[int]) -> bool:
    """Empty the `__slots__` of an object that hold what has one of the ids `unwanted`; whether any did."""
    found = False
    for kind in type(holder).__mro__:
        for slot in vars(kind).values() if "__slots__" in vars(kind) else ():
            if isinstance(slot, MemberDescriptorType) and id(getattr(holder, slot.__name__, None)) in unwanted:
                slot.__delete__(holder)
                found = True
    return found


def _remove(holder: Any, unwanted: Container[int]) -> None:
    """Remove from a container what has one of the ids `unwanted`."""
    if isinstance(holder, (list, deque)):
        for place in reversed(range(len(holder))):
            if id(holder[place]) in unwanted:
                del holder[place]
    elif isinstance(holder, dict):
        # subclasses may refuse to delete
        delete: Any = OrderedDict.__delitem__ if isinstance(holder, OrderedDict) else dict.__delitem__
        for key in [key for key, value in holder.items() if id(value) in unwanted]:
            delete(holder, key)
    elif isinstance(holder, set):
        holder.difference_update([each for each in holder if id(each) in unwanted])
    else:
        holder.cell_contents = None


def _describe(holder: Any, value: Any, ours: set[int]) -> str:
    if type(holder) is CellType:
        return f"a variable of {_owner(holder, ours)}"
    if isinstance(holder, dict):
        for key in holder:
            if holder[key] is value:
                return f"{_owner(holder, ours)}, as {key!r}"
    return f"{_owner(holder, ours)} (a {type(holder).__name__})"


def _owner(holder: Any, ours: set[int], depth: int = 3) -> str:
    """Describe the owner of a container: a module's globals, an object's attribute, a function's closure."""
    if isinstance(holder, dict) and "__name__" in holder and "__builtins__" in holder:
        return f"the globals of {holder['__name__']}"
    for other in gc.get_referrers(holder):
        if id(other) in ours or isinstance(other, FrameType):
            continue
        if getattr(other, "__dict__", None) is holder:
            return f"a {type(other).__name__}"
        if isinstance(other, dict):
            names = [k for k, v in other.items() if v is holder]
            if names and ("__builtins__" in other or isinstance(names[0], str)):
                where = f" of {other['__name__']}" if "__builtins__" in other else ""
                return f"{names[0]}{where}"
        if type(other) is CellType and depth:
            return f"a variable of {_owner(other, ours, depth - 1)}"
        if isinstance(other, tuple):  # of cells
            function = next((f for f in gc.get_referrers(other) if getattr(f, "__closure__", None) is other), None)
            if function is not None:
                return f"{function.__qualname__} ({function.__code__.co_filename}:{function.__code__.co_firstlineno})"
    return f"a {type(holder).__name__}"


def _held_by_views(tensor: Tensor) -> int:
    """The number of references to a Python tensor that its views hold: 0 or 1; always 0 in older versions of torch."""
    return _COUNTED if _COUNTED and tensor._use_count() > 1 else 0


def _counted() -> int:
    base = torch.empty(2, device="meta")
    before = getrefcount(base)
    view = base[:1]
    return getrefcount(base) - before if view is not None else 0


_COUNTED = _counted()
_LRU_CACHE = type(functools.lru_cache(len))
#: what leads from a cache to much else, not to its keys and results
_NO_CONTAINERS = (Tensor, nn.Module, type, ModuleType, FunctionType)
