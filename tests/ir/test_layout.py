"""Sets of rows and layouts, compared with Python's sets."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from fxpass.ir.layout import Layout, PerRank, Rows, even, full, owned, per_rank, routes
from tests.properties import given

positions = st.frozensets(st.integers(0, 60), max_size=40)


@st.composite
def bands(draw: st.DrawFn) -> frozenset[int]:
    """Some columns of some rows of some frames: sets as they occur."""
    sizes = [draw(st.integers(1, 5)) for _ in range(3)]
    picked = [sorted(draw(st.frozensets(st.integers(0, n - 1), min_size=1))) for n in sizes]
    return frozenset(np.arange(np.prod(sizes)).reshape(sizes)[np.ix_(*picked)].reshape(-1).tolist())


sets = positions | bands()


@given(sets)
def test_rows_hold_the_positions_that_they_were_made_of(numbers: frozenset[int]) -> None:
    rows = Rows.of(sorted(numbers))
    assert rows.array.tolist() == sorted(numbers)
    assert len(rows) == len(numbers)
    if numbers:
        assert (rows.start, rows.stop) == (min(numbers), max(numbers) + 1)
        assert rows.contiguous == (max(numbers) - min(numbers) + 1 == len(numbers))


@given(sets, sets)
def test_and_or_minus_and_subset_are_those_of_sets(a: frozenset[int], b: frozenset[int]) -> None:
    left, right = Rows.of(sorted(a)), Rows.of(sorted(b))
    assert left & right == Rows.of(sorted(a & b))
    assert left | right == Rows.of(sorted(a | b))
    assert left - right == Rows.of(sorted(a - b))
    assert (left <= right) == (a <= b)


@given(sets, sets, st.integers(0, 20))
def test_equal_sets_are_equal_objects_however_they_were_made(a: frozenset[int], b: frozenset[int], by: int) -> None:
    left, right = Rows.of(sorted(a)), Rows.of(sorted(b))
    ways = [
        (left - right) | (left & right),
        left.shift(by).shift(-by),
        Rows.of(sorted(a, reverse=True)),
        left & (left | right),
    ]
    for rows in ways:
        assert rows == left
        assert hash(rows) == hash(left)
    if left.contiguous:
        assert left == Rows.interval(min(a), max(a) + 1)


@given(sets, sets, st.integers(0, 20))
def test_locate_and_shift_move_positions(a: frozenset[int], b: frozenset[int], by: int) -> None:
    whole, part = Rows.of(sorted(a)), Rows.of(sorted(a & b))
    assert whole.index(part).tolist() == [sorted(a).index(i) for i in sorted(a & b)]
    assert whole.locate(part) == Rows.of(whole.index(part))
    assert whole.shift(by) == Rows.of([i + by for i in a])


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 12, 20), (33, 64, 64)])
def test_a_band_of_every_frame_is_one_run(frames: int, height: int, width: int) -> None:
    tokens = np.arange(frames * height * width).reshape(frames, height, width)
    assert len(Rows.of(tokens[:, 4:8].reshape(-1)).runs) == 1  # rows
    assert len(Rows.of(tokens[0, :, 4:8].reshape(-1)).runs) == 1  # columns
    assert len(Rows.of(np.concatenate([np.arange(77), 77 + tokens[:, 4:8].reshape(-1)])).runs) <= 2  # behind text


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 8))
def test_even_is_a_disjoint_cover_cut_on_the_grain(size: int, world: int, grain: int) -> None:
    parts = even(size, world, grain)
    assert len(parts) == world
    assert [i for part in parts for i in part.array] == list(range(size))
    assert all(part.start % grain == 0 for part in parts if part.runs)
    lengths = [len(part) // grain for part in parts[:-1]]
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@given(st.lists(sets, min_size=1, max_size=5))
def test_own_gives_each_position_to_the_first_that_holds_it(held: list[frozenset[int]]) -> None:
    result = owned(tuple(Rows.of(sorted(s)) for s in held))
    expected, seen = [], set()
    for numbers in held:
        expected.append(Rows.of(sorted(numbers - seen)))
        seen |= numbers
    assert list(result) == expected


@given(st.lists(sets, min_size=1, max_size=5), st.data())
def test_routes_bring_each_wanted_row_once_from_the_nearest_holder(
    held: list[frozenset[int]], data: st.DataObject
) -> None:
    known = sorted(frozenset().union(*held))
    wanted = [data.draw(st.frozensets(st.sampled_from(known))) if known else frozenset() for _ in held]
    have, want = (tuple(Rows.of(sorted(s)) for s in side) for side in (held, wanted))
    table = routes(have, want)
    for dst, row in enumerate(table):
        brought = [i for part in row for i in part.array.tolist()]
        assert sorted(brought) == sorted(wanted[dst])
        for src, part in enumerate(row):
            for i in part.array.tolist():
                assert i in held[src]
                assert abs(src - dst) == min(abs(k - dst) for k, s in enumerate(held) if i in s)


def test_a_row_that_no_rank_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rank 1 wants rows .* that no rank holds"):
        routes((Rows.interval(0, 4), Rows.interval(4, 8)), (Rows.interval(0, 4), Rows.interval(6, 10)))


def test_a_layout_tells_local_shapes() -> None:
    layout = Layout(1, (Rows.interval(0, 3), Rows.interval(3, 8)))
    assert layout.sizes == (3, 5)
    assert not layout.uniform
    assert layout.local_shape((2, 8, 4), 1) == (2, 5, 4)
    assert layout.at(2).local_shape((2, 4, 8), 0) == (2, 4, 3)
    assert Layout().local_shape((2, 8), 0) == (2, 8)
    with pytest.raises(ValueError, match="no split dim"):
        _ = Layout().axis


@pytest.mark.parametrize("value", [Rows.interval(0, 2).runs[0], Rows.interval(0, 2), Layout(), PerRank((1, 2))])
def test_rows_and_layouts_cannot_be_changed(value: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


def test_an_argument_on_which_all_ranks_agree_is_no_per_rank_argument() -> None:
    assert per_rank([3, 3, 3]) == 3
    assert per_rank([3, 4]) == PerRank((3, 4))
    assert full(4, 2) == (Rows.interval(0, 4),) * 2


def test_an_interval_without_positions_is_the_empty_set() -> None:
    assert Rows.interval(3, 3) == Rows.interval(5, 2) == Rows(())


def test_a_layout_is_uniform_where_all_ranks_hold_equally_many_rows() -> None:
    assert Layout(0, (Rows.interval(0, 2), Rows.of([1, 3]))).uniform
    assert not Layout(0, (Rows.interval(0, 1), Rows.interval(1, 4))).uniform
    assert Layout().uniform


def test_a_layout_prints_its_dim_and_the_blocks_of_each_rank() -> None:
    rows = (Rows.interval(0, 4), Rows.of([4, 5, 8, 9, 12, 13]))
    assert str(Layout(2, rows)) == "dim 2: {0:4} {3x(4:6)+4}"
    assert str(Layout()) == "whole"
