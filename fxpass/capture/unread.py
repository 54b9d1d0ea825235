"""Arguments that a model does not read, for example the id of a prompt: calls that differ in these share programs.

That an argument is not read is a guess, which the next capture tests: a stand-in replaces the argument in a recording,
and raises at every use. So a recording that ends normally does not depend on the argument. Two uses cannot raise, `is`
and `type()`. Therefore stand-ins replace only values that programs compare by `==`, and objects that are copied for the
model anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import CaptureError
from .objects import PLAIN, is_open

if TYPE_CHECKING:
    from .call import Call


@dataclass(eq=False)
class Watch:
    """Shared by the stand-ins of one recording."""

    active: bool = False  #: while the model runs
    touched: bool = False

    def __enter__(self) -> Watch:
        self.active = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """Raises `CaptureError` if a stand-in was used and the model caught the exception."""
        self.active = False
        if self.touched and kind is None:
            raise _error()


def _error() -> CaptureError:
    return CaptureError("the model reads an argument that it did not seem to read")


class StandIn:
    """Raises when it is used while its watch is active."""

    __slots__ = ("_watch",)

    def __init__(self, watch: Watch) -> None:
        object.__setattr__(self, "_watch", watch)


def _raising(name: str) -> Any:
    def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        watch = object.__getattribute__(self, "_watch")
        if watch.active:
            watch.touched = True
            raise _error()
        default = getattr(object, name, None)
        if default is None:
            raise TypeError(f"a stand-in has no {name}")
        return default(self, *args, **kwargs)

    return method


for _name in (
    *("__getattribute__", "__setattr__", "__delattr__", "__eq__", "__ne__", "__hash__", "__str__", "__repr__"),
    *("__format__", "__lt__", "__le__", "__gt__", "__ge__", "__len__", "__iter__", "__contains__", "__getitem__"),
    *("__setitem__", "__call__", "__int__", "__float__", "__index__", "__bytes__", "__fspath__", "__enter__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__and__", "__or__"),
    *("__rand__", "__ror__", "__xor__", "__rxor__", "__lshift__", "__rlshift__", "__rshift__", "__rrshift__"),
    *("__truediv__", "__rtruediv__", "__floordiv__", "__rfloordiv__", "__pow__", "__rpow__", "__divmod__"),
    *("__rdivmod__", "__neg__", "__pos__", "__abs__", "__invert__", "__complex__", "__round__", "__trunc__"),
    *("__reduce_ex__", "__torch_function__", "__array__", "__bool__"),
):
    setattr(StandIn, _name, _raising(_name))


def refuse_stand_ins(leaves: Sequence[Any]) -> None:
    """Raises `CaptureError` if a stand-in is among the values that the model returns or leaves behind."""
    if any(type(leaf) is StandIn for leaf in leaves):
        raise _error()


def may_be_unread(leaf: Any) -> bool:
    """Whether a stand-in can take the place of an argument."""
    if isinstance(leaf, PLAIN):
        return type(leaf) in (str, bytes, int)  # not members of an `Enum`, which are compared by `is`
    if isinstance(leaf, torch.Generator):
        return True  # a program that draws from it is refused
    return (is_open(leaf) and bool(vars(leaf))) or type(leaf).__eq__ is not object.__eq__


class Unread:
    """What is known of a model's arguments, by the keys of calls without those that are not read.

    That an argument is not read is a guess when two calls differ in it alone; of generators of random numbers, which
    pipelines make anew for each call, it is one from the first call on. The next capture tests the guess: it raises
    `CaptureError` if the model reads the argument.
    """

    def __init__(self) -> None:
        self._unread: dict[Any, frozenset[int]] = {}  #: key without these leaves -> the leaves
        self._read: set[Any] = set()  #: keys for which the guess was wrong

    def reduced(self, call: Call, known: Iterable[Any]) -> Call:
        """The call without what is not read, as far as known or guessed.

        Args:
            known: the keys of the programs that are kept, the least recently used first.
        """
        known = list(known)
        if call.key in known:
            return call
        for unread in {*self._unread.values()}:
            if (reduced := call.without(unread)).key in self._unread:
                return reduced
        for unread in (*map(call.differs, reversed(known)), call.seldom_read()):
            if unread and (reduced := call.without(unread)).key not in self._read:
                self._unread[reduced.key] = unread
                return reduced
        return call

    def refute(self, call: Call) -> Call:
        """The same call with all its arguments: the guess was wrong."""
        self._unread.pop(call.key, None)
        self._read.add(call.key)
        return call.without(frozenset())
