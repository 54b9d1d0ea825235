"""Convolutions, pooling and interpolation against law 1: cut where the rule promises it, and anywhere."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpass.ir.layout import Rows
from fxpass.passes.rules.windows import Transposed, Window
from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import cut, evenly, split
from tests.properties import examples, few, given, some

# -- windows ---------------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool = False) -> Example:
    """One to three dims, any kernel, stride, dilation, groups and padding."""
    spatial = draw(st.integers(1, 3))
    size, stride, dilation = ([draw(st.integers(1, n)) for _ in range(spatial)] for n in (4, 3, 2))
    groups = draw(st.sampled_from([1, 2]))
    named: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if transposed:
        named["output_padding"] = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        lengths = [draw(st.integers(3, 7)) for _ in range(spatial)]
        most = [min(r, ((n - 1) * s + r) // 2) for r, n, s in zip(reach, lengths, stride, strict=True)]
        named["padding"] = [draw(st.integers(0, m)) for m in most]
    else:
        same = draw(st.booleans()) and stride == [1] * spatial
        named["padding"] = "same" if same else [draw(st.integers(0, (r + 1) // 2)) for r in reach]
        lengths = [draw(st.integers(max(3, r + 1), r + 7)) for r in reach]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    module = kind(2, 4, size, **named).double()
    batch = draw(st.sampled_from([(), (2,)]))
    dims = range(len(batch) + 1, len(batch) + 1 + spatial)
    return Example(module, [randn(*batch, 2, *lengths)], {0: [*range(len(batch)), *dims]})


@examples(150)
@given(convolutions(), st.data())
def test_convolutions_are_split_along_space(example: Example, data: st.DataObject) -> None:
    split_where_promised(data, example)


@examples(100)
@given(convolutions(transposed=True), st.data())
def test_transposed_convolutions_are_split_along_space(example: Example, data: st.DataObject) -> None:
    split_where_promised(data, example)


@some
@given(convolutions() | convolutions(transposed=True), st.data())
def test_convolutions_are_right_on_any_cut(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


def test_a_transposed_convolution_whose_kernel_leaves_gaps_is_right() -> None:
    for kernel, stride, dilation in [(1, 2, 1), (1, 3, 1), (2, 4, 2), (2, 5, 3)]:
        conv = nn.ConvTranspose1d(2, 2, kernel, stride, output_padding=1, dilation=dilation).double()
        for rows in (cut(2, (0, 1), (1, 3)), cut(2, (1, 2), [0, 2]), cut(2, [0, 2], (1, 2))):
            split(conv, [randn(1, 2, 3)], {0: rows}, 2)


def test_a_transposed_convolution_that_only_pads_is_right() -> None:
    conv = nn.ConvTranspose2d(2, 2, 1, dilation=2, output_padding=1).double()
    split(conv, [randn(1, 2, 4, 5)], {0: evenly(2, 4, 2)}, 2)
    # the last rank computes the last row, to which no input row is added
    split(conv, [randn(1, 2, 4, 5)], {0: cut(2, [0, 1, 3], [2], [2], [3])}, 4)


def test_a_convolution_fetches_its_halo_only() -> None:
    conv = nn.Conv2d(3, 3, 5, padding=2).double()
    result = split(conv, [randn(1, 3, 12, 7)], {0: evenly(2, 12, 3)}, 3)
    assert result.roles == {"halo": 1, "output": 1}
    (halo,) = (e for e in result.exchanges if e.role == "halo")
    assert halo.bytes == 4 * 2 * (3 * 7) * 8  # four borders, two rows each
    assert result.layouts[0] == evenly(2, 12, 3)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_convolution_of_windows_that_lie_side_by_side_moves_nothing(stride: int) -> None:
    conv = nn.Conv2d(3, 3, stride, stride).double()
    assert split(conv, [randn(1, 3, 16, 8)], {0: cut(2, (0, 4), (4, 16))}, 2).roles == {"output": 1}


@st.composite
def poolings(draw: st.DrawFn, mean: bool, plain: bool) -> Example:
    spatial = draw(st.integers(1, 3))
    size = [draw(st.integers(1, 3)) for _ in range(spatial)]
    named: dict[str, Any] = {
        "stride": draw(st.none() | st.just([draw(st.integers(1, 3)) for _ in range(spatial)])),
        "padding": [draw(st.integers(0, k // 2)) for k in size],
    }
    if mean:
        named["ceil_mode"] = not plain and draw(st.booleans())
        named["count_include_pad"] = plain or draw(st.booleans())
        if spatial > 1 and draw(st.booleans()):
            named["divisor_override"] = 3
    else:
        named["ceil_mode"] = draw(st.booleans())
        named["dilation"] = [draw(st.integers(1, 2)) for _ in range(spatial)]
    module = getattr(nn, f"{'Avg' if mean else 'Max'}Pool{spatial}d")(size, **named)
    batch = draw(st.sampled_from([(), (2,)]))
    lengths = [draw(st.integers(5, 9)) for _ in range(spatial)]
    return Example(module, [randn(*batch, 2, *lengths)], {0: range(len(batch) + 1 + spatial)})


@examples(100)
@given(poolings(mean=False, plain=False) | poolings(mean=True, plain=True), st.data())
def test_pooling_is_split_along_any_dim(example: Example, data: st.DataObject) -> None:
    split_where_promised(data, example)


@examples(40)
@given(poolings(mean=True, plain=False), st.data())
def test_averages_of_windows_of_unequal_size_are_right(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


def test_averages_are_split_where_no_window_is_cut_short() -> None:
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    assert "fallback" not in split(pool, [randn(1, 3, 16, 8)], {0: cut(2, (0, 5), (5, 16))}, 2).roles


@pytest.mark.parametrize("rows", range(8, 14))
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (4, 3, 2), (5, 2, 2), (2, 3, 1)])
def test_a_last_window_that_is_cut_short_divides_by_fewer_rows(rows: int, size: int, stride: int, padding: int) -> None:
    pool = nn.AvgPool1d(size, stride, padding, ceil_mode=True)
    split(pool, [randn(1, 3, rows)], {0: evenly(2, rows, 2)}, 2, exact=False)


# -- resampling ------------------------------------------------------------------------------------------------------


@st.composite
def interpolations(draw: st.DrawFn) -> Example:
    spatial = draw(st.integers(1, 3))
    smooth = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[spatial]
    mode = draw(st.sampled_from(["nearest", "nearest-exact", *smooth]))
    lengths = [draw(st.integers(3, 7)) for _ in range(spatial)]
    named: dict[str, Any] = {"mode": mode}
    if mode in smooth:
        named["align_corners"] = draw(st.booleans())
        named["antialias"] = mode in ("bilinear", "bicubic") and draw(st.booleans())
    if draw(st.booleans()):
        named["size"] = [draw(st.integers(3, 12)) for _ in range(spatial)]
    else:
        scales = st.sampled_from([0.5, 0.7, 1.0, 1.1, 1.5, 2.0, 2.3, 3.0])
        named["scale_factor"] = [draw(scales) for _ in range(spatial)]
        named["recompute_scale_factor"] = draw(st.sampled_from([None, True]))
    # torch's antialiased kernels are wrong where a rank has a single column, so columns are no promise
    dims = range(2 + spatial - named.get("antialias", False))
    if named.get("antialias") and "scale_factor" in named and int(lengths[-1] * named["scale_factor"][-1]) == 1:
        dims = range(2)
    return Example(lambda x: F.interpolate(x, **named), [randn(2, 3, *lengths)], {0: dims}, str(named))


@examples(120)
@given(interpolations(), st.data())
def test_every_mode_of_interpolation_is_split(example: Example, data: st.DataObject) -> None:
    split_where_promised(data, example)


@some
@given(interpolations(), st.data())
def test_interpolation_is_right_on_any_cut(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


def test_a_scale_that_changes_no_size_still_resamples() -> None:
    x = randn(1, 2, 6, 4)  # 4 columns at scale 1.2 are 4 columns, which lie elsewhere
    for mode in ("nearest", "bilinear"):
        function = lambda x, mode=mode: F.interpolate(x, scale_factor=(2.0, 1.2), mode=mode)  # noqa: E731
        split(function, [x], {0: evenly(2, 6, 2)}, 2)


def test_an_antialiased_kernel_that_torch_computes_wrongly_is_not_trusted() -> None:
    def function(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(9, 3), mode="bilinear", antialias=True)

    for rows in (cut(2, (0, 1), (1, 4)), cut(3, (0, 1), (1, 3))):
        split(function, [randn(1, 2, 4, 3)], {0: rows}, 2, exact=False)


def test_an_antialiased_result_of_one_column_is_what_torch_makes_of_it() -> None:
    def function(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(0.7, 0.5), mode="bilinear", antialias=True)

    assert "fallback" in split(function, [randn(2, 3, 3, 3)], {0: cut(2, (0, 1), (1, 3))}, 2, exact=False).roles


def test_nearest_doubling_moves_nothing() -> None:
    x = randn(1, 2, 6, 4)
    assert split(lambda x: F.interpolate(x, scale_factor=2.0), [x], {0: cut(2, (0, 1), (1, 6))}, 2).roles == {
        "output": 1
    }


@pytest.mark.parametrize("how", [{"size": (1000, 6)}, {"scale_factor": (1000 / 512, 1.3)}], ids=["size", "scale"])
@pytest.mark.parametrize(
    "named",
    [{"mode": "nearest"}, {"mode": "nearest-exact"}, {"mode": "area"}]
    + [{"mode": mode, "align_corners": True} for mode in ("bilinear", "bicubic")]
    + [{"mode": mode, "antialias": antialias} for mode in ("bilinear", "bicubic") for antialias in (False, True)],
    ids=lambda named: " ".join(str(value) for value in named.values()),
)
def test_positions_among_a_thousand_rows_round_as_torch_rounds_them(named: Any, how: Any) -> None:
    x = randn(1, 2, 512, 5, dtype=torch.float32)  # positions in float64 would be off by 4e-5 of the values
    assert split(lambda x: F.interpolate(x, **how, **named), [x], {0: evenly(2, 512, 2)}, 2).layouts[0].split


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.AdaptiveAvgPool1d(4), (2, 3, 9)),
        (nn.AdaptiveAvgPool2d(4), (2, 3, 7, 8)),
        (nn.AdaptiveAvgPool2d((3, 5)), (3, 7, 8)),
        (nn.AdaptiveAvgPool2d((None, 4)), (2, 3, 7, 8)),
        (nn.AdaptiveAvgPool3d((4, 4, 5)), (2, 3, 5, 6, 7)),
        (nn.AdaptiveMaxPool1d(4), (2, 3, 9)),
        (nn.AdaptiveMaxPool2d(1), (2, 3, 7, 8)),
        (nn.AdaptiveMaxPool2d((None, 4)), (3, 7, 8)),
        (nn.AdaptiveMaxPool2d((3, 4)), (2, 3, 7, 8)),
        (nn.AdaptiveMaxPool3d((4, 2, 5)), (2, 3, 5, 6, 7)),
        (partial(F.interpolate, size=5, mode="area"), (2, 3, 9)),
        (partial(F.interpolate, size=(5, 9), mode="area"), (2, 3, 7, 8)),
        (partial(F.interpolate, size=(4, 4, 9), mode="area"), (1, 3, 6, 5, 7)),
    ],
    ids=lambda value: type(value).__name__,
)
@few
@given(data=st.data())
def test_adaptive_pooling_is_split(module: Any, shape: tuple[int, ...], data: st.DataObject) -> None:
    split_where_promised(data, Example(module, [randn(*shape)], {0: range(len(shape))}))


@pytest.mark.parametrize("size", [1, 3, 4, (2, 5)])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (3, 7, 8)])
@few
@given(data=st.data())
def test_adaptive_pooling_is_right(size: Any, shape: tuple[int, ...], data: st.DataObject) -> None:
    split_anywhere(data, Example(nn.AdaptiveAvgPool2d(size), [randn(*shape)]))


@few
@given(data=st.data())
def test_the_positions_of_adaptive_maxima_are_right(data: st.DataObject) -> None:
    split_anywhere(data, Example(nn.AdaptiveMaxPool2d((3, 4), return_indices=True), [randn(2, 3, 7, 8)]))


@few
@given(data=st.data())
def test_adaptive_pooling_of_one_and_three_dims_is_right(data: st.DataObject) -> None:
    split_anywhere(data, Example(nn.AdaptiveAvgPool1d(4), [randn(2, 3, 9)]))
    split_anywhere(data, Example(nn.AdaptiveAvgPool3d((2, 3, 4)), [randn(2, 3, 5, 6, 7)]))


@pytest.mark.parametrize("kind", [Window, Transposed])
@examples(100)
@given(st.data())
def test_a_window_reaches_exactly_the_input_rows_that_its_output_rows_read(
    kind: type[Window], data: st.DataObject
) -> None:
    size, stride, dilation = (data.draw(st.integers(1, most)) for most in (4, 3, 3))
    window = kind(size, stride, data.draw(st.integers(0, (size - 1) * dilation)), dilation)
    first = data.draw(st.integers(0, 9))
    rows = range(first, first + data.draw(st.integers(1, 4)))
    reached = {i for i in range(-40, 60) for o in rows if _reads(window, o, i)}
    lo, hi = window.reach(Rows.interval(rows.start, rows.stop))
    if reached:  # a transposed window shorter than its stride may skip all of the rows
        assert lo <= min(reached)
        assert max(reached) < hi
        tight = kind is Window or size * dilation >= stride
        slack = 0 if kind is Window else dilation
        assert not tight or (min(reached) - lo <= slack and hi - 1 - max(reached) <= slack)


def _reads(window: Window, output: int, row: int) -> bool:
    """Whether an output row reads an input row."""
    a, b = (row, output) if isinstance(window, Transposed) else (output, row)
    return any(b == a * window.stride - window.padding + window.dilation * k for k in range(window.size))


# -- patches ---------------------------------------------------------------------------------------------------------


@st.composite
def patches(draw: st.DrawFn, fold: bool) -> Example:
    kernel, stride, dilation = ([draw(st.integers(1, most)) for _ in range(2)] for most in (3, 3, 2))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(0, min(r, 2))) for r in reach]
    size = [draw(st.integers(max(4, r + 1), r + 9)) for r in reach]
    named: dict[str, Any] = {"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride}
    if not fold:
        return Example(partial(F.unfold, **named), [randn(2, 2, *size)], {0: (0, 1, 2, 3)})
    windows = F.unfold(torch.zeros(1, 1, *size), **named).shape[2]
    return Example(partial(F.fold, output_size=size, **named), [randn(2, 2 * prod(kernel), windows)], {0: (0, 1, 2)})


@examples(60)
@given(patches(fold=False) | patches(fold=True), st.data())
def test_patches_are_cut_out_and_added_up_on_any_cut(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


@pytest.mark.parametrize("first", [1, 4], ids="{} rows on the first rank".format)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((2, 1), (1, 0), (1, 1)), ((3, 2), (0, 1), (1, 2)), ((1, 1), (0, 0), (2, 1))],
)
def test_patches_are_added_up_on_every_rank_by_itself(
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], first: int
) -> None:
    named = {"kernel_size": (3, 2), "dilation": dilation, "padding": padding, "stride": stride}
    grid = [
        (18 + 2 * p - d * (k - 1) - 1) // s + 1 for p, d, k, s in zip(padding, dilation, (3, 2), stride, strict=True)
    ]
    rows = [(0, first * grid[1]), (first * grid[1], grid[0] * grid[1])]
    found = split(partial(F.fold, output_size=(18, 18), **named), [randn(1, 12, prod(grid))], {0: cut(2, *rows)}, 2)
    assert "fallback" not in found.roles


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (5, 3)])
def test_windows_that_keep_the_size_are_centred_on_their_own_row(size: int, dilation: int) -> None:
    window = Window(size, 1, (size - 1) * dilation // 2, dilation)
    assert window.centres(9).tolist() == list(range(9))
