"""Which arguments a model does not read: calls that differ in these alone share their programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..capture import Call


class Unread:
    """What is known of a model's arguments, by the keys of calls without those that are not read.

    That an argument is not read is a guess when two calls differ in it alone. The next capture tests the guess: it
    raises `CaptureError` if the model reads the argument.
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
        for key in reversed(known):
            unread = call.differs(key)
            if unread and (reduced := call.without(unread)).key not in self._read:
                self._unread[reduced.key] = unread
                return reduced
        return call

    def refute(self, call: Call) -> Call:
        """The same call with all its arguments: the guess was wrong."""
        self._unread.pop(call.key, None)
        self._read.add(call.key)
        return call.without(frozenset())
