"""Channels over a process group, as NCCL's are used: any payloads, in buffers that hold garbage until they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxpass
from fxpass.ir import comm
from fxpass.ir.exchange import Exchange
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Rows, full
from fxpass.ir.merge import Reduce
from fxpass.ir.mesh import Placement
from fxpass.ir.step import ChannelSpec
from fxpass.runtime.channels import RankChannel
from fxpass.runtime.process_group import GroupChannel, gathered, padding
from tests.passes.harness import rows
from tests.properties import given

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool]
CPU = torch.device("cpu")


class Mailbox:
    """One rank's end of a group whose messages arrive when they are awaited."""

    def __init__(self, ends: list[Mailbox]) -> None:
        self.ends = ends
        self.rank = len(ends)
        ends.append(self)
        self.sent: list[Tensor] = []  #: by destination
        self.arriving = 0  #: bytes from the others
        self.deliver: Callable[[], None] = lambda: None

    def _allgather_base(self, receive: Tensor, send: Tensor) -> Mailbox:
        return self._launched(receive, [send.clone()] * len(self.ends), [len(send)] * len(self.ends))

    def alltoall_base(self, receive: Tensor, send: Tensor, receives: list[int], sends: list[int]) -> Mailbox:
        return self._launched(receive, list(send.clone().split(sends)), receives)

    def _launched(self, receive: Tensor, sent: list[Tensor], receives: list[int]) -> Mailbox:
        self.sent = sent
        self.arriving = sum(receives) - receives[self.rank]

        def deliver() -> None:
            for src, (start, stop) in enumerate(pairwise(accumulate(receives, initial=0))):
                receive[start:stop] = self.ends[src].sent[self.rank]

        receive.random_(0, 255)
        self.deliver = deliver
        return self

    def wait(self) -> None:
        self.deliver()


def board(rank: int, world: int) -> Any:
    """A board without other ranks."""
    return SimpleNamespace(rank=rank, world=world)


def through_channels(
    exchanges: Sequence[Exchange], values: list[list[Tensor]]
) -> tuple[list[list[Tensor]], list[bool]]:
    """By rank, the results of each exchange; whether all ranks gathered."""
    world = len(values)
    spec = ChannelSpec("exchange", "", tuple(exchanges), late=False)
    ends: list[Mailbox] = []
    each = Placement.one_each(world)
    between = [
        GroupChannel(spec, Mailbox(ends), range(world), CPU, False, board(rank, world), each) for rank in range(world)
    ]
    channels = [RankChannel.of_ranks(spec, [rank], CPU, between[rank])[0] for rank in range(world)]
    for rank, channel in enumerate(channels):
        channel.put([each.pack(rank, x) for each, x in zip(exchanges, values[rank], strict=True)])
    received = [channel.get() for channel in channels]
    for rank, end in enumerate(ends):
        payloads = sum(each.received(rank) for each in exchanges)
        assert end.arriving == payloads + padding(spec.exchanges, rank)
    results = [
        [
            comm.unpack(x, part, each, rank)
            for x, part, each in zip(values[rank], received[rank], exchanges, strict=True)
        ]
        for rank in range(world)
    ]
    return results, [channel.gather for channel in between]


def part(fetch: Fetch, whole: Tensor, mine: Rows) -> Tensor:
    return whole.index_select(fetch.dim, torch.tensor(mine.array.tolist(), dtype=torch.int64))


@given(st.data(), st.integers(2, 4), st.integers(1, 3))
def test_any_message_arrives_as_it_was_sent(data: st.DataObject, world: int, count: int) -> None:
    exchanges: list[Any] = []
    wholes = []
    for _ in range(count):
        shape = [2, 3, 2]
        dim = data.draw(st.integers(0, 2))
        size = shape[dim] = data.draw(st.integers(world, 9))
        dtype, order = data.draw(st.sampled_from(DTYPES)), data.draw(st.permutations(range(3)))
        have = data.draw(rows(size, world))
        want = data.draw(st.just(full(size, world)) | rows(size, world, kinds="uneven overlap"))
        exchanges.append(
            Fetch("realign", tuple(shape), dtype, world, dim=dim, have=have, want=want, order=tuple(order))
        )
        wholes.append((torch.randn(shape) * 9).to(dtype))
    pairs = list(zip(exchanges, wholes, strict=True))
    found, as_one = through_channels(exchanges, [[part(e, x, e.have[r]) for e, x in pairs] for r in range(world)])
    assert len(set(as_one)) == 1
    for rank, results in enumerate(found):
        for (e, whole), result in zip(pairs, results, strict=True):
            assert torch.equal(result, part(e, whole, e.want[rank]))


def test_messages_of_equal_size_from_all_ranks_are_gathered_however_small() -> None:
    total = Reduce("sum", (3,), torch.float32, 3)
    found, as_one = through_channels([total], [[torch.full((3,), float(r))] for r in range(3)])
    assert all(as_one)
    assert [result.tolist() for (result,) in found] == [[3.0] * 3] * 3


@pytest.mark.parametrize("world", [2, 3])
def test_an_all_gather_of_equal_messages_pads_nothing(world: int) -> None:
    total = Reduce("sum", (4,), torch.float32, world)
    assert gathered(ChannelSpec("sum", "", (total,), late=False), Placement.one_each(world)) == 16
    assert padding((total,), 0) == 0


class Attention(nn.Module):
    """Tokens attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, self.keys(x), self.values(x))


@pytest.mark.parametrize(("strategy", "later"), [("displaced", 3), ("no_sync", 1)])
def test_a_plan_tells_what_its_all_gathers_pad(strategy: str, later: int) -> None:
    """10 tokens of 16 bytes on 4 ranks; those with 2 pad them to 3: the others receive both pads, they each other's."""
    made = fxpass.plan(Attention(), torch.randn(1, 10, 4), world_size=4, strategy=strategy)
    row = torch.tensor([2, 1]) * 16
    exact, displaced = ([made.padding_received(rank, exact=e) for rank in range(4)] for e in (True, False))
    assert sorted(exact, reverse=True) == (3 * row).repeat_interleave(2).tolist()  # keys, values (one node) and output
    assert sorted(displaced, reverse=True) == (later * row).repeat_interleave(2).tolist()
    assert made.describe()["padding_received_per_rank"] == exact
    assert made.describe()["padding_received_per_rank_displaced"] == displaced


def test_payloads_of_unequal_size_are_not_rows_of_the_result() -> None:
    halves = (Rows.interval(0, 2), Rows.interval(2, 4))
    halo = Fetch("halo", (4, 3), torch.float32, 2, dim=0, have=halves, want=full(4, 2))
    with pytest.raises(AssertionError, match=r"rank 0 got .* from rank 1"):
        halo.unpack(0, torch.ones(2, 3), [None, torch.ones(1, 3)])
