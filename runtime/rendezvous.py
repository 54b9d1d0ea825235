"""Where the ranks meet to map each other's GPU memory: torch does that for a registered process group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import PrefixStore, ProcessGroup, Store

from .board import Board

_EXCHANGE = re.compile(r"(.*SymmetricMemory/)(\d+)(.*)")  #: a key of torch: the number counts in the whole process
_numbers = count()  #: of the groups that this process has registered


def local_group(board: Board, backend: Any) -> Callable[[], AbstractContextManager[ProcessGroup]]:
    """A process group for ranks that have none which torch knows; registered while its context lasts.

    It moves nothing: torch reads its ranks and store. The default process group, and what is registered else, stay as
    they are.

    Args:
        backend: one of the same ranks, which torch asks for the name of the group.
    """
    name = f"fxpass/local/{next(_numbers)}"
    store = AlignedStore(PrefixStore("symmetric", board.store))
    group = ProcessGroup(store, board.rank, board.world)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.CUSTOM, backend)
    group._set_group_name(name)  # pyright: ignore[reportArgumentType]
    group._set_group_desc("fxpass")

    return partial(_registered, name, group, store)


@contextmanager
def _registered(name: str, group: ProcessGroup, _: Store) -> Iterator[ProcessGroup]:
    """Have a group registered. The store is an argument to keep it alive: torch holds only its C++ part."""
    _register_process_group(name, group)  # pyright: ignore[reportArgumentType]
    try:
        yield group
    finally:
        _unregister_process_group(name)  # pyright: ignore[reportArgumentType]


class AlignedStore(Store):
    """A store in which the exchanges of symmetric memory have the same numbers on all ranks.

    torch numbers them by how many each process has made, for whatever group. Of the ranks here, one is the user's
    process, which may have made others before. So they are numbered by when they first come to this store.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._own: dict[str, int] = {}  #: torch's numbers -> those of this store

    def _key(self, key: str) -> str:
        found = _EXCHANGE.fullmatch(key)
        if found is None:
            return key
        prefix, number, rest = found.groups()
        return f"{prefix}{self._own.setdefault(number, len(self._own))}{rest}"

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._key(key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._store.multi_get([self._key(key) for key in keys])

    def add(self, key: str, value: int) -> int:
        return self._store.add(self._key(key), value)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check([self._key(key) for key in keys])

    def wait(self, keys: Sequence[str], *timeout: timedelta) -> None:
        self._store.wait([self._key(key) for key in keys], *timeout)
