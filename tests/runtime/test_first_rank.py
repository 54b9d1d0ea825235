"""What rank 0 computes for all ranks: which arguments are compared, and what can be sent."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from fxpass.runtime.board import Board
from fxpass.runtime.errors import DisagreementError, RankError
from fxpass.runtime.first_rank import FirstRank, described, packed
from fxpass.runtime.pickling import Unpickler

HERE = torch.device("cpu")


def at_once(actions: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(actions)) as pool:
        return [each.result(60) for each in [pool.submit(action) for action in actions]]


def ranks() -> list[FirstRank]:
    store = HashStore()
    return [FirstRank(Board(store, rank, 2, 20.0)) for rank in range(2)]


def call(first: FirstRank, arguments: dict[str, Any], value: Any = None) -> Any:
    first.meet("text", arguments)
    if first._board.rank == 0:
        first.send("text", value)
        return value
    return first.awaited("text")(HERE)


def test_tensors_travel_and_the_rest_is_pickled() -> None:
    shared = torch.randn(2, 3)
    values = [
        OrderedDict(a=shared, b=[shared, torch.tensor(True), torch.empty(0, 4)], c=(None, 3)),
        (torch.randn(2, 3, dtype=torch.bfloat16).T, torch.randn(3, dtype=torch.complex64).conj(), np.arange(3)),
    ]
    first, second = ranks()
    for value in values:
        sent, found = at_once([lambda v=value: call(first, {}, v), lambda: call(second, {})])
        assert sent is value
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    assert found[0].dtype == torch.bfloat16


def test_a_tensor_that_comes_twice_is_sent_once() -> None:
    shared = torch.ones(2)
    payload, tensors = packed([shared, {"again": shared}])
    assert len(tensors) == 1
    again = Unpickler(payload, tensors.__getitem__).load()
    assert again[0] is again[1]["again"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, device="meta"), "on the device meta"),
        (torch.ones(2).to_sparse(), "no plain tensor"),
        (lambda: 0, "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_named(value: Any, words: str) -> None:
    first = FirstRank(Board(HashStore(), 0, 1, 20.0))
    first.meet("text", {})
    with pytest.raises(TypeError, match=f"what text returns cannot be sent to the other ranks .*{words}|{words}"):
        first.send("text", [value])


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (torch.arange(500), torch.arange(500) + (torch.arange(500) == 77), "another value of `ids`"),
        (torch.ones(3), torch.ones(4), r"with \(4,\) torch.float32 for `ids`, rank 0 with \(3,\)"),
        (torch.ones(3), torch.zeros(3), "another value of `ids`"),
        ("a cat", "a dog", "with 'a dog' for `ids`, rank 0 with 'a cat'"),
        (np.ones(3), np.zeros(3), "another value of `ids`"),
        ([1, 2], [1, 3], r"with 3 for `ids\[1\]`"),
    ],
)
def test_unlike_arguments_are_named_on_both_ranks(mine: Any, theirs: Any, words: str) -> None:
    first, second = ranks()

    def meets(rank: FirstRank, value: Any) -> None:
        with pytest.raises(DisagreementError, match=words):
            rank.meet("text", {"ids": value, "other": torch.ones(2)})

    at_once([lambda: meets(first, mine), lambda: meets(second, theirs)])
    at_once([lambda: call(first, {}, 1), lambda: call(second, {})])  # the next one succeeds


def test_ranks_that_call_different_parts_are_named() -> None:
    first, second = ranks()

    def meets(rank: FirstRank, what: str) -> None:
        with pytest.raises(DisagreementError, match="rank 1 calls vision, rank 0 text"):
            rank.meet(what, {})

    at_once([lambda: meets(first, "text"), lambda: meets(second, "vision")])


def test_floating_point_arguments_may_be_rounded() -> None:
    first, second = ranks()
    x = torch.randn(40)
    assert at_once([lambda: call(first, {"x": x}, 1), lambda: call(second, {"x": x + 1e-4})]) == [1, 1]


def test_meetings_leave_as_many_keys_in_the_store_as_before() -> None:
    first, second = ranks()
    counts = []
    for _ in range(4):
        at_once([lambda: call(first, {}, 1), lambda: call(second, {})])
        counts.append(first._board.store.num_keys())
    assert counts[1] == counts[3]


def test_a_group_in_which_a_rank_hangs_is_not_waited_for() -> None:
    both = ranks()
    at_once([lambda: call(both[0], {}, torch.ones(2)), lambda: call(both[1], {})])
    both[0]._board.timeout = 1.0
    with pytest.raises(RankError, match="another rank hangs") as raised:
        both[0].broadcast(torch.ones(40_000_000, dtype=torch.uint8))
    both[0].abort(raised.value)
    del raised
    began = time.monotonic()
    del both[0]
    gc.collect()
    assert time.monotonic() - began < 5


def test_a_store_that_has_ended_is_a_rank_error() -> None:
    class Ending(HashStore):
        ended = False

        def set(self, key: str, value: str) -> None:
            if self.ended:
                raise RuntimeError("Connection reset by peer\nframe #0")
            super().set(key, value)

    store = Ending()
    first = FirstRank(Board(store, 0, 1, 20.0))
    store.ended = True
    with pytest.raises(RankError, match=r"the rank that kept it \(Connection reset by peer\)$"):
        first.meet("text", {})


def test_arguments_are_described_leaf_by_leaf() -> None:
    assert list(described({"images": [torch.ones(2), torch.ones(2)], "scale": 1.0})) == [
        "images[0]",
        "images[1]",
        "scale",
    ]


def test_a_rank_that_is_about_to_leave_a_place_is_not_taken_for_one_that_waits_there() -> None:
    store = HashStore()
    early, late = (Board(store, rank, 2, 20.0) for rank in range(2))
    with early.meeting("the second place"):
        with late.meeting("the first place"):
            late._look()  # it has waited for a while, and says so
            early._look()
        early._look()
        with late.meeting("the first place"):
            late._look()
            early._look()
            with pytest.raises(RankError, match="rank 1 waits in the first place, but rank 0 in the second place"):
                early._look()
