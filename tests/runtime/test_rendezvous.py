"""Ranks without a process group of their user's meet to map GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store

from fxpass.runtime.board import Board
from fxpass.runtime.rendezvous import AlignedStore, local_group


def exchange(store: Store, number: int, rank: int, value: bytes) -> list[bytes]:
    """All-gather two values as torch does through a store: the number counts all exchanges of the process."""
    keys = [f"CUDASymmetricMemory/{number}/{r}" for r in range(2)]
    store.set(keys[rank], value)  # type: ignore[arg-type]
    store.wait(keys)
    found = [bytes(store.get(key)) for key in keys]
    assert found == list(map(bytes, store.multi_get(keys)))
    store.barrier(f"CUDASymmetricMemory/{number + 1}", 2)
    return found


def test_ranks_meet_though_one_of_them_has_made_more_exchanges_before() -> None:
    shared = HashStore()

    def rank(number: int) -> list[list[bytes]]:
        aligned = AlignedStore(shared)  # torch keeps only its C++ part alive
        store = PrefixStore("group", aligned)
        first = (0, 100)[number]
        # one of them makes exchanges with others in between
        numbers = [first, first + (2, 7)[number]]
        return [exchange(store, n, number, b"%d %d" % (number, i)) for i, n in enumerate(numbers)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert found[0] == found[1] == [[b"0 0", b"1 0"], [b"0 1", b"1 1"]]


def test_other_keys_stay_as_they_are() -> None:
    inner = HashStore()
    store = AlignedStore(inner)
    store.set("symm_mem_validate/x/7/0", "a")
    store.set("CUDASymmetricMemory/7/0", "b")
    assert inner.get("symm_mem_validate/x/7/0") == b"a"
    assert inner.get("CUDASymmetricMemory/0/0") == b"b"
    assert store.check(["CUDASymmetricMemory/7/0"])
    assert store.add("count", 2) == 2
    assert inner.add("count", 1) == 3


def test_a_group_is_known_to_torch_only_within_its_context() -> None:
    def made(rank: int) -> Callable[[], AbstractContextManager[ProcessGroup]]:
        backend = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, 2, timedelta(seconds=30))
        return local_group(Board(store, rank, 2, 30.0), backend)

    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(made, range(2)))
    names: list[Any] = []
    for rank, each in enumerate(groups):
        with each() as group:
            names.append(group.group_name)
            known = _resolve_process_group(names[-1])
            assert (known.rank(), known.size()) == (rank, 2)
            assert not dist.is_initialized()
    assert len(set(names)) == 2
    for name in names:
        with pytest.raises(RuntimeError, match=name):
            _resolve_process_group(name)
