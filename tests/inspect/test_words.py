"""Graphs, layouts and exchanges as text."""

import pytest
import torch

from fxpass.inspect.words import (
    bytes_text,
    cuts_text,
    exchange_text,
    flops_text,
    layout_text,
    seconds_text,
    sizes_text,
)
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import WHOLE, Layout, Rows, even
from fxpass.ir.merge import Moments


def halo(size: int, world: int, width: int) -> Fetch:
    have = even(size, world)
    want = tuple(Rows.interval(max(r.start - width, 0), min(r.stop + width, size)) for r in have)
    before, after = (width, *(0,) * (world - 1)), (*(0,) * (world - 1), width)
    return Fetch("halo", (1, 4, size, 8), torch.float32, world, dim=2, have=have, want=want, before=before, after=after)


@pytest.mark.parametrize(
    ("shape", "dim", "text"),
    [
        ((2, 4, 64, 32), 2, "[B, C, H/4, W]"),
        ((2, 4, 64, 32), None, "[B, C, H, W]"),
        ((2, 4, 9, 64, 32), 3, "[B, C, F, H/4, W]"),
        ((2, 64, 8), 1, "[B, L/4, C]"),
        ((64, 2), 0, "[D0/4, D1]"),
        ((), None, "[]"),
    ],
)
def test_a_layout_names_the_dims_and_where_it_is_split(shape: tuple[int, ...], dim: int | None, text: str) -> None:
    layout = WHOLE if dim is None else Layout(dim, even(64, 4))
    assert layout_text(shape, layout) == text


def test_sizes_are_those_of_the_rank() -> None:
    layout = Layout(2, even(50, 4))
    assert [sizes_text((1, 4, 50, 8), layout, rank) for rank in (0, 2)] == [
        "1x4x12x8 (H: 12 of 50)",
        "1x4x13x8 (H: 13 of 50)",
    ]
    assert sizes_text((), WHOLE, 0) == "scalar"


def test_cuts_are_listed_and_overlapping_rows_written_out() -> None:
    assert cuts_text(even(64, 4), 64) == "64 rows, cut at 16, 32, 48"
    assert cuts_text((Rows.interval(0, 5), Rows.interval(3, 8)), 8) == "8 rows: {0:5} {3:8}"


@pytest.mark.parametrize(
    ("rank", "text"),
    [(0, "halo(H: 1 down, 1 zero up)"), (1, "halo(H: 1 up, 1 down)"), (2, "halo(H: 1 up, 1 zero down)")],
)
def test_a_halo_is_described_by_rows_from_each_side(rank: int, text: str) -> None:
    assert exchange_text(halo(24, 3, 1), rank) == text


def test_a_gather_is_described_by_rows_before_and_after() -> None:
    everything = (Rows.interval(0, 4096),) * 8
    gather = Fetch("keys_values", (2, 4096, 64), torch.float16, 8, dim=1, have=even(4096, 8), want=everything)
    assert exchange_text(gather, 3) == "gather(L: 512 -> 4096)"
    moved = Fetch("realign", (2, 50, 64), torch.float16, 2, dim=1, have=even(50, 2), want=even(50, 2, 10))
    assert exchange_text(moved, 0) == "move(L: 25 -> 20)"


def test_moments_are_described_by_their_number_of_elements() -> None:
    text = exchange_text(Moments("moments", (2, 1, 8), torch.float32, 2, counts=(512, 512)), 0)
    assert text == "moments(1x8 of 1024 elements)"


def test_quantities_are_rounded_for_reading() -> None:
    assert [bytes_text(n) for n in (0, 999, 1500, 20_000_000, 3_140_000_000)] == [
        "0 B", "999 B", "1.5 kB", "20.0 MB", "3.1 GB",
    ]  # fmt: skip
    assert [seconds_text(s) for s in (8e-5, 1.5e-3, 2)] == ["80.0 us", "1.5 ms", "2.00 s"]
    assert (bytes_text(999_960), flops_text(999_999), seconds_text(0.99999)) == ("1.0 MB", "1.00 MFLOP", "1.00 s")
    assert [flops_text(n) for n in (12, 1_780_000_000, 3e18)] == ["12 FLOP", "1.78 GFLOP", "3000000.00 TFLOP"]
