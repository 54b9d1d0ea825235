"""Every exchange against the whole tensor."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fxpass.ir.exchange import Exchange
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Rows, full
from fxpass.ir.merge import Moments, Reduce
from fxpass.ir.ops import group_moments, group_normalize, moments
from tests.passes.harness import cut, exchanged, rows
from tests.properties import given


@st.composite
def wanted(draw: st.DrawFn, size: int, world: int) -> tuple[Rows, ...]:
    """Any rows on each rank, none at all included."""
    some = st.frozensets(st.integers(0, size - 1)).map(lambda s: Rows.of(sorted(s)))
    span = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ab: Rows.interval(min(ab), max(ab)))
    return tuple(draw(some | span | st.just(Rows.interval(0, size))) for _ in range(world))


def part(x: Tensor, dim: int, mine: Rows) -> Tensor:
    return x.index_select(dim, torch.tensor(mine.array.tolist(), dtype=torch.int64))


def after(exchange: Exchange, values: list[Tensor]) -> list[Tensor]:
    return [result[0] for result in exchanged([exchange], [[x] for x in values])]


@given(
    st.data(),
    st.integers(1, 5),
    st.integers(0, 2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_fetch_takes_any_layout_to_any_other(data: st.DataObject, world: int, dim: int, dtype: torch.dtype) -> None:
    shape = [2, 3, 2]
    size = shape[dim] = data.draw(st.integers(max(world, 2), 12))
    have, want = data.draw(rows(size, world)), data.draw(wanted(size, world))
    whole = (torch.randn(shape) * 9).to(dtype)
    fetch = Fetch("realign", tuple(shape), dtype, world, dim=dim, have=have, want=want)
    for rank, found in enumerate(after(fetch, [part(whole, dim, mine) for mine in have])):
        assert torch.equal(found, part(whole, dim, want[rank]))
        assert fetch.received(rank) == sum(fetch.numel(src, rank) for src in range(world)) * dtype.itemsize
        lacking = len(want[rank] - have[rank]) * whole.numel() // size
        assert fetch.received(rank) == lacking * dtype.itemsize  # nothing travels that is there
        payloads = fetch.pack(rank, part(whole, dim, have[rank]))
        assert [x.numel() if x is not None else 0 for x in payloads] == [fetch.numel(rank, d) for d in range(world)]
        assert all(x is None or x.numel() for x in payloads)  # no empty message


@given(st.data(), st.integers(1, 4), st.sampled_from([0.0, 1.5, float("-inf")]))
def test_fetch_frames_a_halo_with_fill(data: st.DataObject, world: int, fill: float) -> None:
    size = data.draw(st.integers(max(world, 2), 10))
    have, want = data.draw(rows(size, world)), data.draw(rows(size, world, kinds="uneven overlapping"))
    before, behind = (tuple(data.draw(st.integers(0, 3)) for _ in range(world)) for _ in range(2))
    whole = torch.randn(2, size, 3)
    fetch = Fetch("halo", (2, size, 3), whole.dtype, world, "", 1, have, want, before, behind, fill)
    for rank, found in enumerate(after(fetch, [part(whole, 1, mine) for mine in have])):
        fills = [torch.full((2, n, 3), fill) for n in (before[rank], behind[rank])]
        assert torch.equal(found, torch.cat([fills[0], part(whole, 1, want[rank]), fills[1]], 1))


def test_fetch_returns_its_operand_where_nothing_changes() -> None:
    x = torch.randn(4, 3)
    fetch = Fetch("realign", (4, 3), x.dtype, 2, dim=0, have=full(4, 2), want=full(4, 2))
    assert all(found is x for found in after(fetch, [x, x]))
    assert fetch.bytes == fetch.messages == 0


def test_ranks_that_get_the_same_rows_get_them_in_the_same_strides() -> None:
    """The kernels of some operators round differently for other strides."""
    wide = torch.randn(2, 5, 3)
    fetch = Fetch("small", (2, 3, 3), wide.dtype, 2, dim=1, have=cut(1, (0, 0), (0, 3)).rows, want=full(3, 2))
    values = [wide[:, :0], wide[:, 1:4]]  # rank 1 has all rows, as a view of more
    found = after(fetch, values)
    assert torch.equal(found[0], found[1])
    assert found[0].stride() == found[1].stride() == (9, 3, 1)


def test_fetch_describes_its_messages() -> None:
    halves = cut(0, (0, 2), (2, 4)).rows
    gather = Fetch("output", (4, 3), torch.float32, 2, dim=0, have=halves, want=full(4, 2))
    assert gather.broadcast
    assert gather.bytes == 2 * 2 * 3 * 4
    halo = Fetch("halo", (4, 3), torch.float32, 2, dim=0, have=halves, want=cut(0, (0, 3), (1, 4)).rows)
    assert not halo.broadcast
    assert str(halo) == "halo(dim 0: 2 -> 3 of 4 rows)"


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any), st.floats(-1e3, 1e3), st.floats(1e-3, 10))
def test_moments_are_those_of_all_elements(counts: list[int], mean: float, deviation: float) -> None:
    parts = [torch.randn(3, count, dtype=torch.float64) * deviation + mean for count in counts]
    exchange = Moments("moments", (2, 3, 1), torch.float64, len(counts), counts=tuple(counts))
    variance, average = torch.var_mean(torch.cat(parts, 1), 1, correction=0, keepdim=True)
    results = after(exchange, [moments(x, [1]) for x in parts])
    for found in results:
        torch.testing.assert_close(found[0], average, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], variance, rtol=1e-9, atol=1e-12)
        assert torch.equal(found, results[0])  # the same bits on every rank


def test_moments_survive_a_large_mean_and_a_small_variance() -> None:
    x = torch.randn(1, 4096) * 1e-2 + 100.0
    parts = x.split([1000, 96, 3000], 1)
    exchange = Moments("moments", (2, 1, 1), torch.float32, 3, counts=(1000, 96, 3000))
    variance = torch.var_mean(x.double(), 1, correction=0, keepdim=True)[0]
    found = after(exchange, [moments(part, [1]) for part in parts])[0][1]
    assert ((found - variance).abs() / variance).item() < 1e-3  # E x² - (E x)² has no correct digit here


@given(st.data(), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans())
def test_group_norm_in_parts_is_group_norm(data: st.DataObject, world: int, groups: int, affine: bool) -> None:
    size = data.draw(st.integers(max(2, world), 9))
    x = torch.randn(2, 4, size, 3, dtype=torch.float64) * 3 + 5
    weight, bias = (torch.randn(4, dtype=torch.float64) if affine else None for _ in range(2))
    cuts = data.draw(rows(size, world, kinds="uneven strided"))
    parts = [part(x, 2, mine) for mine in cuts]
    counts = tuple(len(mine) * 3 * 4 // groups for mine in cuts)
    exchange = Moments("moments", (2, 2, groups), x.dtype, world, counts=counts)
    expected = torch.nn.functional.group_norm(x, groups, weight, bias)
    for mine, local, statistics in zip(
        cuts, parts, after(exchange, [group_moments(p, groups) for p in parts]), strict=True
    ):
        found = group_normalize(local, statistics, groups, weight, bias, 1e-5)
        torch.testing.assert_close(found, part(expected, 2, mine), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", ["sum", "amax", "amin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_reduce_gives_all_ranks_the_same_bits(op: str, dtype: torch.dtype, world: int) -> None:
    parts = [(torch.randn(3, 4) * 9).to(dtype) for _ in range(world)]
    exchange = Reduce("sum", (3, 4), dtype, world, op=op)  # type: ignore[arg-type]
    stacked = torch.stack(parts)
    expected = stacked.sum(0, dtype=torch.float64).to(dtype) if op == "sum" else getattr(stacked, op)(0)
    results = after(exchange, parts)
    torch.testing.assert_close(results[0], expected)
    assert all(torch.equal(found, results[0]) for found in results)
    assert all(found.dtype == dtype for found in results)


def test_sums_of_low_precision_are_added_in_float32_in_rank_order() -> None:
    parts = [torch.tensor([x], dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0)]
    exchange = Reduce("sum", (1,), torch.bfloat16, 3)
    assert after(exchange, parts)[0].item() == 258.0  # 256 + 1 is 256 in bfloat16


@given(
    st.data(),
    st.integers(2, 4),
    st.integers(0, 3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_receivers_decode_exactly_the_value_that_the_sender_keeps(
    data: st.DataObject, world: int, dim: int, dtype: torch.dtype, channels_last: bool
) -> None:
    """For any layouts, split along any dim, in any precision and order in memory; and that is near the value."""
    shape = [2, 3, 5, 4]
    shape[dim] = 9
    have, want = data.draw(rows(9, world)), data.draw(wanted(9, world))
    fetch = Fetch("halo", tuple(shape), dtype, world, dim=dim, have=have, want=want, fresh="stale", bits=8)
    order = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=order) for _ in range(2))
    known = [fetch.known(r, part(old, dim, have[r])) for r in range(world)]
    arrived = [fetch.pack(r, part(old, dim, have[r])) for r in range(world)]
    sent = [fetch.outgoing(r, part(new, dim, have[r]), known[r]) for r in range(world)]
    for src, (codes, now_known) in enumerate(sent):
        assert now_known is not None
        for dst, payload in enumerate(fetch.wire.pack(src, codes)):
            if payload is None:
                assert arrived[src][dst] is None
                continue
            assert payload.dtype == torch.uint8
            assert tuple(payload.shape) == fetch.wire.payload_shape(src, dst)
            before = arrived[src][dst]
            assert before is not None
            found = fetch.incoming(payload, before)
            rows_sent = fetch._sent[src].locate(fetch.table[dst][src])
            assert torch.equal(found, part(now_known, dim, rows_sent))
            wanted_now = part(new, dim, fetch.table[dst][src])
            torch.testing.assert_close(found, wanted_now, rtol=0.02, atol=0.04)
