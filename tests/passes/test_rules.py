"""Every rule against law 1: cut where the rule promises a split (then without fallback), and cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.examples import Example, examples, randn, split_anywhere, split_where_promised
from tests.passes.harness import cut, evenly, layouts, split

few = examples(8)
some = examples(25)

# -- pointwise -------------------------------------------------------------------------------------------------------

POINTWISE = {
    "silu": F.silu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "x * 2 + 1": lambda x: x * 2 + 1,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "where": lambda x: torch.where(x > 0, x, -x),
    "sin and cos": lambda x: x.sin() + x.cos(),
    "pow": lambda x: x**2 + 2.0**x,
    "to another dtype": lambda x: x.to(torch.float32) * 2,
    "logical": lambda x: ((x > 0) & ~(x > 1)).to(x.dtype),
    "zeros_like, ones_like, full_like": lambda x: (
        torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 3.0) + x
    ),
    "erf, exp, tanh": lambda x: x.erf() + x.exp() + x.tanh(),
    "rsqrt": lambda x: torch.rsqrt(x.square() + 1),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "remainder": lambda x: x % 0.7 + x // 0.3,
    "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
}


@pytest.mark.parametrize("name", POINTWISE)
@few
@given(data=st.data())
def test_pointwise_operators_keep_any_cut(name: str, data: st.DataObject) -> None:
    result = split_where_promised(data, Example(POINTWISE[name], [randn(2, 5, 6)], {0: (1, 2)}))
    assert set(result.roles) <= {"output"}


@st.composite
def broadcasts(draw: st.DrawFn) -> Example:
    """Two or three operands of shapes that broadcast to [2, 5, 6], one of them of the full shape."""
    target: tuple[int, ...] = (2, 5, 6)
    shapes: list[tuple[int, ...]] = [target]
    for _ in range(draw(st.integers(1, 2))):
        ndim = draw(st.integers(0, 3))
        shapes.append(tuple(n if draw(st.booleans()) else 1 for n in target[3 - ndim :]))
    shapes = draw(st.permutations(shapes))
    functions = {
        2: [lambda a, b: a * b, lambda a, b: torch.where(a > b, a, b), lambda a, b: a.masked_fill(b > 0, 0.5)],
        3: [
            torch.addcmul,
            lambda a, b, c: torch.where(a > 0, b, c),
            lambda a, b, c: a + b * c,
        ],
    }
    function = draw(st.sampled_from(functions[len(shapes)]))
    if shapes[0] != target:
        function = functions[len(shapes)][0]
    return Example(function, [randn(*s) for s in shapes], {i: range(len(s)) for i, s in enumerate(shapes)})


@examples(40)
@given(broadcasts(), st.data())
def test_operands_that_broadcast_are_brought_to_one_layout(example: Example, data: st.DataObject) -> None:
    assert not split_anywhere(data, example).fallbacks


@some
@given(broadcasts(), st.data())
def test_whole_operands_are_sliced_for_free(example: Example, data: st.DataObject) -> None:
    shapes = [tuple(x.shape) for x in example.inputs]
    example.promised = {shapes.index((2, 5, 6)): (0, 1, 2)}
    assert set(split_where_promised(data, example).roles) <= {"output"}


# -- views -----------------------------------------------------------------------------------------------------------

H, W = 6, 4
VIEWS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {  # name: function, shape, promised dims
    "rows x columns to tokens": (lambda x: x.flatten(2).transpose(1, 2), (2, 3, H, W), (0, 1, 2)),
    "frames x rows x columns to tokens": (lambda x: x.flatten(2).transpose(1, 2), (1, 3, 2, H, W), (1, 2, 3, 4)),
    "heads": (lambda x: x.view(2, 8, 3, 4).transpose(1, 2), (2, 8, 12), (1,)),
    "heads back": (lambda x: x.transpose(1, 2).reshape(2, 8, 12), (2, 3, 8, 4), (1, 2, 3)),
    "unsqueeze and squeeze": (lambda x: x[:, None].unsqueeze(-1).squeeze(1).squeeze(-1), (2, 5, 3), (0, 1, 2)),
    "expand": (lambda x: x[:, :, None].expand(2, 5, 3, 4) * 1, (2, 5, 4), (0, 1, 2)),
    "expand in front": (lambda x: x.expand(2, 3, 5, 4) * 1, (5, 4), (0, 1)),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), (2, 3, 5, 4), (0, 2)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), (2, 5, 4), (0, 1, 2)),
    "movedim": (lambda x: x.movedim(1, -1), (2, 5, 6), (0, 1, 2)),
    "complex pairs": (lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), (2, 5, 6, 2), (1, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
@few
@given(data=st.data())
def test_views_keep_any_cut(name: str, data: st.DataObject) -> None:
    function, shape, dims = VIEWS[name]
    result = split_where_promised(data, Example(function, [randn(*shape)], {0: dims}))
    assert set(result.roles) <= {"output", "realign", "small"}
    assert "realign" not in result.roles or "heads" in name or "pairs" in name


def pack(x: Tensor) -> Tensor:
    """2 x 2 pixels to a token."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(x: Tensor) -> Tensor:
    return x.view(2, 4, 3, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 2, 8, 6)


def windows(x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)


@pytest.mark.parametrize(
    ("function", "shape", "layout"),
    [
        (pack, (2, 2, 8, 6), cut(2, (0, 2), (2, 8))),
        (pack, (2, 2, 8, 6), cut(2, (0, 4), (2, 8))),
        (pack, (1, 2, 8, 6), cut(3, (0, 2), (2, 6))),
        (unpack, (2, 12, 8), cut(1, (0, 3), (3, 12))),
        (unpack, (2, 12, 8), cut(1, [0, 3, 6, 9], [1, 2, 4, 5, 7, 8, 10, 11])),
        (windows, (1, 8, 6, 3), cut(1, (0, 2), (2, 8))),
        (windows, (1, 8, 6, 3), cut(2, (0, 2), (2, 6))),
        (lambda x: F.pixel_unshuffle(x, 2), (2, 3, 8, 6), cut(2, (0, 2), (2, 8))),
        (lambda x: F.pixel_shuffle(x, 2), (2, 4, 5, 6), cut(2, (0, 2), (2, 5))),
        (lambda x: F.pixel_shuffle(x, 2), (2, 4, 5, 6), cut(3, (0, 1), (1, 6))),
        (lambda x: x.unflatten(1, (3, 4)).flatten(0, 1), (2, 12, 5), cut(2, (0, 2), (2, 5))),
        (lambda x: x.reshape(2, 5, 3, 2), (2, 5, 6), cut(2, (0, 2), (2, 6))),
        (lambda x: x.reshape(1, 2, 1, 5, 1), (2, 5), cut(1, (0, 2), (2, 5))),
    ],
)
def test_cuts_on_the_grain_go_through_a_reshape_without_communication(function: Any, shape: Any, layout: Any) -> None:
    result = split(function, [randn(*shape)], {0: layout}, 2)
    assert result.roles == {"output": 1}
    assert result.layouts[0].split


@pytest.mark.parametrize("function", [pack, windows, lambda x: F.pixel_unshuffle(x, 2)])
def test_cuts_off_the_grain_are_realigned(function: Any) -> None:
    dim = 1 if function is windows else 2
    shape = (1, 8, 6, 3) if function is windows else (1, 3, 8, 6)
    result = split(function, [randn(*shape)], {0: cut(dim, (0, 3), (3, 8))}, 2)
    assert result.roles == {"output": 1, "realign": 1}


@st.composite
def reshapes(draw: st.DrawFn) -> Example:
    """Any factorisation to any other, dims of size one included."""

    def factors() -> list[int]:
        shape: list[int] = [1]
        for prime in draw(st.permutations([2, 2, 2, 3, 3])):
            if draw(st.booleans()):
                shape.append(1)
            shape[-1] *= prime
        return shape

    source, target = factors(), factors()
    return Example(lambda x: (x * 2).reshape(target) + 1, [randn(*source)], {}, title=f"{source} -> {target}")


@examples(60)
@given(reshapes(), st.data())
def test_any_reshape_of_any_cut_is_right(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


# -- slices and joints -----------------------------------------------------------------------------------------------


def written(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:5] = y
    return x


SLICING: dict[str, tuple[Any, list[tuple[int, ...]], dict[int, tuple[int, ...]]]] = {
    "slice": (lambda x: x[:, 1:5], [(2, 7, 6)], {0: (0, 1, 2)}),
    "strided slice": (lambda x: x[:, 1::2], [(2, 7, 6)], {0: (1, 2)}),
    "select": (lambda x: x[:, 2], [(2, 7, 6)], {0: (0, 1, 2)}),
    "chunk": (lambda x: [c * i for i, c in enumerate(x.chunk(3, 1))], [(2, 6, 5)], {0: (0, 1, 2)}),
    "split and unbind": (lambda x: [*x.split([1, 4, 2], 1), *x.unbind(2)], [(2, 7, 3)], {0: (0, 1, 2)}),
    "cat along": (lambda x, y: torch.cat([x, y], 1), [(2, 7, 6), (2, 4, 6)], {0: (0, 1, 2), 1: (0, 1, 2)}),
    "cat with itself": (lambda x: torch.cat([x, x * 2, x], 1), [(2, 5, 3)], {0: (0, 1, 2)}),
    "cat in the middle": (lambda x, y: torch.cat([y, x, y], -1), [(2, 7, 6), (2, 7, 1)], {0: (0, 1, 2)}),
    "stack": (lambda x, y: torch.stack([x, y], 1), [(2, 7), (2, 7)], {0: (0, 1), 1: (0, 1)}),
    "text and image, then image": (lambda t, x: torch.cat([t, x], 1)[:, 3:] * 2, [(2, 3, 6), (2, 7, 6)], {1: (1,)}),
    "constant pad": (lambda x: F.pad(x, (1, 2, 3, 0), value=0.5), [(2, 5, 6)], {0: (0, 1, 2)}),
    "negative pad elsewhere": (lambda x: F.pad(x, (-1, 0)), [(2, 5, 6)], {0: (0, 1)}),
    "reflect 1d": (lambda x: F.pad(x, (2, 3), mode="reflect"), [(2, 3, 7)], {0: (0, 1, 2)}),
    "reflect 2d": (lambda x: F.pad(x, (2, 3, 1, 2), mode="reflect"), [(2, 3, 6, 7)], {0: (0, 1, 2, 3)}),
    "reflect rows": (lambda x: F.pad(x, (0, 0, 1, 2), mode="reflect"), [(2, 3, 6, 7)], {0: (0, 1, 2, 3)}),
    "reflect 3d": (lambda x: F.pad(x, (1, 1, 2, 0, 1, 2), mode="reflect"), [(1, 2, 4, 5, 3)], {0: (1, 2, 3, 4)}),
    "replicate 1d": (lambda x: F.pad(x, (2, 3), mode="replicate"), [(2, 3, 7)], {0: (0, 1, 2)}),
    "replicate 2d": (lambda x: F.pad(x, (2, 3, 4, 2), mode="replicate"), [(2, 3, 4, 5)], {0: (0, 1, 2, 3)}),
    "replicate 3d": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate"), [(1, 2, 4, 5, 3)], {0: (1, 2, 3, 4)}),
    "circular 1d": (lambda x: F.pad(x, (2, 3), mode="circular"), [(2, 3, 7)], {0: (0, 1, 2)}),
    "circular 2d": (lambda x: F.pad(x, (2, 3, 1, 2), mode="circular"), [(2, 3, 6, 7)], {0: (0, 1, 2, 3)}),
    "flip": (lambda x: x.flip(1), [(2, 7, 6)], {0: (0, 1, 2)}),
    "flip two": (lambda x: x.flip(1, -1), [(2, 7, 6)], {0: (0, 1, 2)}),
    "roll": (lambda x: x.roll(2, 1), [(2, 7, 6)], {0: (0, 1, 2)}),
    "roll two": (lambda x: x.roll((-2, 3), (1, -1)), [(2, 7, 6)], {0: (0, 1, 2)}),
    "roll twice": (lambda x: x.roll((1, 2), (1, 1)), [(2, 7, 6)], {0: (0, 1, 2)}),
    "slice_scatter": (
        lambda x, y: torch.slice_scatter(x, y, 1, 2, 5), [(2, 7, 6), (2, 3, 6)], {0: (0, 1, 2), 1: (0, 1, 2)}
    ),
    "strided slice_scatter": (
        lambda x, y: torch.slice_scatter(x, y, 1, 0, 6, 2), [(2, 7, 6), (2, 3, 6)], {0: (0, 2), 1: (0, 2)}
    ),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 1, 3), [(2, 7, 6), (2, 6)], {0: (0, 1, 2), 1: (0, 1)}),
    "written in place": (written, [(2, 7, 6), (2, 3, 6)], {0: (0, 1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICING)
@few
@given(data=st.data())
def test_movements_along_a_dim_are_split(name: str, data: st.DataObject) -> None:
    function, shapes, promised = SLICING[name]
    split_where_promised(data, Example(function, [randn(*s) for s in shapes], promised))


@pytest.mark.parametrize("name", SLICING)
@few
@given(data=st.data())
def test_movements_along_a_dim_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    function, shapes, _ = SLICING[name]
    split_anywhere(data, Example(function, [randn(*s) for s in shapes]))


@pytest.mark.parametrize("name", ["slice", "cat along", "cat with itself", "constant pad", "flip", "roll"])
def test_what_only_moves_rows_moves_nothing_between_ranks(name: str) -> None:
    function, shapes, _ = SLICING[name]
    for dim in (1, 2):
        result = split(function, [randn(*s) for s in shapes], {0: evenly(dim, shapes[0][dim], 2)}, 2)
        assert set(result.roles) == {"output"}


# -- look-ups --------------------------------------------------------------------------------------------------------

INDEXING: dict[str, tuple[Any, list[Any], dict[int, tuple[int, ...]]]] = {
    "embedding": (lambda t, i: F.embedding(i, t), [(9, 4), (2, 7)], {1: (0, 1)}),
    "index_select": (lambda x, i: x.index_select(1, i), [(2, 9, 4), (6,)], {0: (0, 2), 1: (0,)}),
    "x[i]": (lambda x, i: x[i], [(9, 4, 3), (2, 5)], {0: (1, 2), 1: (0, 1)}),
    "x[:, i]": (lambda x, i: x[:, i], [(2, 9, 4), (5,)], {0: (0, 2), 1: (0,)}),
    "x[:, i, j]": (lambda x, i, j: x[:, i, j], [(2, 9, 9, 3), (4, 1), (5,)], {0: (0, 3), 1: (0,), 2: (0,)}),
    "x[i, :, j]": (lambda x, i, j: x[i, :, j], [(9, 4, 9, 3), (5,), (5,)], {0: (1, 3), 1: (0,), 2: (0,)}),
    "gather": (lambda x, i: x.gather(1, i), [(5, 9, 4), (5, 6, 4)], {0: (0, 2), 1: (0, 1, 2)}),
    "gather of fewer": (lambda x, i: x.gather(1, i), [(5, 9, 4), (3, 6, 2)], {1: (1,)}),
    "take_along_dim": (lambda x, i: x.take_along_dim(i, 1), [(5, 9, 4), (5, 6, 4)], {0: (0, 2), 1: (0, 1, 2)}),
    "new_zeros": (lambda x, i: x + x.new_zeros(4) + i.sum(), [(5, 9, 4), (3,)], {0: (0, 1, 2)}),
}


def looked_up(name: str) -> Example:
    function, shapes, promised = INDEXING[name]
    return Example(function, [randn(*shapes[0]), *(torch.randint(0, 9, s) for s in shapes[1:])], promised)


@pytest.mark.parametrize("name", INDEXING)
@few
@given(data=st.data())
def test_look_ups_are_split(name: str, data: st.DataObject) -> None:
    split_where_promised(data, looked_up(name))


@pytest.mark.parametrize("name", INDEXING)
@few
@given(data=st.data())
def test_look_ups_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    split_anywhere(data, looked_up(name))


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


def test_nearest_doubling_moves_nothing() -> None:
    x = randn(1, 2, 6, 4)
    assert split(lambda x: F.interpolate(x, scale_factor=2.0), [x], {0: cut(2, (0, 1), (1, 6))}, 2).roles == {
        "output": 1
    }


@pytest.mark.parametrize("size", [1, 3, 4, (2, 5)])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (3, 7, 8)])
@few
@given(data=st.data())
def test_adaptive_pooling_is_right(size: Any, shape: tuple[int, ...], data: st.DataObject) -> None:
    split_anywhere(data, Example(nn.AdaptiveAvgPool2d(size), [randn(*shape)]))


@few
@given(data=st.data())
def test_adaptive_pooling_of_one_and_three_dims_is_right(data: st.DataObject) -> None:
    split_anywhere(data, Example(nn.AdaptiveAvgPool1d(4), [randn(2, 3, 9)]))
    split_anywhere(data, Example(nn.AdaptiveAvgPool3d((2, 3, 4)), [randn(2, 3, 5, 6, 7)]))


# -- norms -----------------------------------------------------------------------------------------------------------


def norms() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]]:  # module, shape, promised dims
    cases: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
        "group": (nn.GroupNorm(2, 4), (2, 4, 6, 5), (0, 2, 3)),
        "group of tokens": (nn.GroupNorm(4, 4), (2, 4, 9), (0, 2)),
        "group without weights": (nn.GroupNorm(1, 4, affine=False), (2, 4, 3, 5, 2), (0, 2, 3, 4)),
        "layer": (nn.LayerNorm(6), (2, 7, 6), (0, 1, 2)),
        "layer of two dims": (nn.LayerNorm([7, 6]), (2, 7, 6), (0, 1, 2)),
        "layer without weights": (nn.LayerNorm(6, elementwise_affine=False), (2, 7, 6), (0, 1, 2)),
        "layer without bias": (nn.LayerNorm(6, bias=False), (2, 7, 6), (0, 1, 2)),
        "rms": (nn.RMSNorm(6), (2, 7, 6), (0, 1)),
        "batch": (nn.BatchNorm2d(4), (2, 4, 6, 5), (0, 2, 3)),
        "instance": (nn.InstanceNorm2d(4, affine=True), (2, 4, 6, 5), (0, 2, 3)),
    }
    for module, _, _ in cases.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return cases


@pytest.mark.parametrize("name", norms())
@few
@given(data=st.data())
def test_norms_are_split(name: str, data: st.DataObject) -> None:
    module, shape, dims = norms()[name]
    split_where_promised(data, Example(module.double(), [randn(*shape)], {0: dims}))


@pytest.mark.parametrize("name", norms())
@few
@given(data=st.data())
def test_norms_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    module, shape, _ = norms()[name]
    split_anywhere(data, Example(module.double(), [randn(*shape)]))


@few
@given(st.data())
def test_the_weights_of_norms_may_be_split(data: st.DataObject) -> None:
    split_anywhere(data, Example(lambda x, w, b: F.group_norm(x, 2, w, b), [randn(2, 4, 6), randn(4), randn(4)]))
    split_anywhere(data, Example(lambda x, w, b: F.layer_norm(x, (6,), w, b), [randn(2, 4, 6), randn(6), randn(6)]))
    split_anywhere(data, Example(lambda x, w: F.rms_norm(x, (6,), w), [randn(2, 4, 6), randn(6)]))
    moments = [randn(4), randn(4).abs()]
    split_anywhere(
        data, Example(lambda x, m, w: F.batch_norm(x, m, moments[1], w), [randn(2, 4, 6), randn(4), randn(4)])
    )


def test_a_norm_over_the_split_dim_exchanges_its_moments_only() -> None:
    result = split(nn.GroupNorm(2, 4).double(), [randn(2, 4, 6, 5)], {0: cut(2, (0, 1), (1, 6))}, 2)
    assert result.roles == {"moments": 1, "output": 1}
    assert next(e for e in result.exchanges if e.role == "moments").received(0) == 2 * 2 * 2 * 8


# -- reductions ------------------------------------------------------------------------------------------------------


REDUCTIONS: dict[str, Any] = {
    "sum": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "mean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "amax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "amin": lambda x, dims, keep: x.amin(dims, keepdim=keep),
    "var": lambda x, dims, keep: x.var(dims, keepdim=keep),
    "biased var": lambda x, dims, keep: x.var(dims, correction=0, keepdim=keep),
    "var_mean": lambda x, dims, keep: torch.var_mean(x, dims, keepdim=keep),
    "std": lambda x, dims, keep: x.std(dims, keepdim=keep),
    "norm": lambda x, dims, keep: torch.linalg.vector_norm(x, dim=dims, keepdim=keep),
    "sum of integers": lambda x, dims, keep: (x > 0).sum(dims, keepdim=keep),
    "sum in another dtype": lambda x, dims, keep: x.float().sum(dims, keepdim=keep, dtype=torch.float64),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@examples(15)
@given(data=st.data(), keep=st.booleans())
def test_reductions_are_split(name: str, data: st.DataObject, keep: bool) -> None:
    dims = data.draw(st.sampled_from([(0,), (1,), (2,), (0, 2), (1, 2), (-1, -2), (0, 1, 2)]), label="dims")
    split_where_promised(data, Example(lambda x: REDUCTIONS[name](x, dims, keep), [randn(3, 5, 6)], {0: (0, 1, 2)}))


@few
@given(st.data())
def test_reductions_of_everything_are_split(data: st.DataObject) -> None:
    function = lambda x: (x.sum(), x.mean(), x.amax(), x.amin(), x.var(), x.std())  # noqa: E731
    split_where_promised(data, Example(function, [randn(3, 5, 6)], {0: (0, 1, 2)}))


def test_the_variance_of_complex_numbers_is_right() -> None:
    found = split(lambda x: torch.view_as_complex(x).var(1), [randn(3, 8, 2)], {0: evenly(1, 8, 2)}, 2, exact=False)
    (reason,) = found.fallbacks
    assert "complex" in reason


def test_a_product_with_negative_zero_is_another_value() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.abs() + 1
        return (x * 0.0).reciprocal().sign() * 2 + (x * -0.0).reciprocal().sign()

    split(function, [randn(2, 8, 4)], {0: evenly(1, 8, 2)}, 2)


def test_a_mean_in_half_precision_does_not_overflow() -> None:
    def function(x: Tensor) -> Tensor:
        return (x * 0 + 3e4).to(torch.float16).mean((1, 2)).double()

    split(function, [randn(2, 8, 4)], {0: evenly(1, 8, 2)}, 2)


ALONG: dict[str, Any] = {
    "softmax": lambda x, dim: x.softmax(dim),
    "log_softmax": lambda x, dim: x.log_softmax(dim),
    "cumsum": lambda x, dim: x.cumsum(dim),
    "cumprod": lambda x, dim: x.cumprod(dim),
    "glu": F.glu,
    "sort": lambda x, dim: list(x.sort(dim)),
    "topk": lambda x, dim: list(x.topk(3, dim)),
    "topk smallest": lambda x, dim: x.topk(2, dim, largest=False).values,
}


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dim", [1, -1])
@few
@given(data=st.data())
def test_what_works_along_one_dim_is_split_along_the_others(name: str, dim: int, data: st.DataObject) -> None:
    example = Example(lambda x: ALONG[name](x, dim), [randn(3, 4, 6)], {0: [d for d in range(3) if d != dim % 3]})
    split_where_promised(data, example)


@pytest.mark.parametrize("name", ALONG)
@few
@given(data=st.data())
def test_what_works_along_one_dim_is_right_on_any_cut(name: str, data: st.DataObject) -> None:
    split_anywhere(data, Example(lambda x: ALONG[name](x, 1), [randn(3, 4, 6)]))


# -- products --------------------------------------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[Any, list[tuple[int, ...]], dict[int, Any]]] = {
    "linear": (F.linear, [(2, 5, 6), (4, 6), (4,)], {0: (0, 1, 2)}),
    "linear without bias": (F.linear, [(5, 6), (4, 6)], {0: (0, 1)}),
    "linear of a vector": (F.linear, [(6,), (4, 6), (4,)], {0: (0,)}),
    "linear to a number": (F.linear, [(3, 5, 6), (6,)], {0: (0, 1, 2)}),
    "mm": (torch.mm, [(4, 5), (5, 6)], {0: (0, 1), 1: (0, 1)}),
    "bmm": (torch.bmm, [(3, 4, 5), (3, 5, 6)], {0: (0, 1, 2), 1: (0, 1, 2)}),
    "matmul": (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)], {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}),
    "matmul that broadcasts": (torch.matmul, [(2, 1, 4, 5), (3, 5, 6)], {0: (0, 2, 3), 1: (0, 1, 2)}),
    "matmul by a matrix": (torch.matmul, [(2, 3, 4, 5), (5, 6)], {0: (0, 1, 2, 3), 1: (0, 1)}),
    "matmul by a vector": (torch.matmul, [(2, 4, 5), (5,)], {}),
    "addmm": (torch.addmm, [(6,), (4, 5), (5, 6)], {0: (0,), 1: (0, 1), 2: (0, 1)}),
    "addmm scaled": (lambda a, x, y: torch.addmm(a, x, y, beta=0.5, alpha=2), [(4, 6), (4, 5), (5, 6)],
                     {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "addmm that adds nothing": (lambda a, x, y: torch.addmm(a, x, y, beta=0), [(4, 6), (4, 5), (5, 6)],
                                {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "baddbmm": (torch.baddbmm, [(3, 1, 6), (3, 4, 5), (3, 5, 6)], {0: (0, 2), 1: (0, 1, 2), 2: (0, 1, 2)}),
    "einsum": (
        lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y), [(2, 3, 4, 5), (2, 3, 6, 5)], {0: range(4), 1: range(4)}
    ),
    "einsum of three": (lambda x, y, z: torch.einsum("ab,bc,cd->ad", x, y, z), [(3, 4), (4, 5), (5, 3)],
                        {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "einsum that sums": (lambda x: torch.einsum("abc->b", x), [(3, 4, 5)], {0: (0, 1, 2)}),
    "einsum that permutes": (lambda x: torch.einsum("nhwpqc->nchpwq", x), [(2, 4, 3, 2, 2, 3)], {0: range(6)}),
    "einsum that broadcasts": (lambda x, y: torch.einsum("bi,bj->bij", x, y), [(1, 4), (3, 5)], {0: (1,), 1: (0, 1)}),
    "einsum without letters": (lambda x, y: torch.einsum("...i,ij->...j", x, y), [(2, 3, 4), (4, 5)], {}),
    "einsum of a diagonal": (lambda x: torch.einsum("iij->ij", x), [(4, 4, 5)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, case in PRODUCTS.items() if case[2]])
@examples(12)
@given(data=st.data())
def test_products_are_split_along_every_dim_of_every_operand(name: str, data: st.DataObject) -> None:
    function, shapes, promised = PRODUCTS[name]
    split_where_promised(data, Example(function, [randn(*s) for s in shapes], promised))


@pytest.mark.parametrize("name", PRODUCTS)
@few
@given(data=st.data())
def test_products_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    function, shapes, _ = PRODUCTS[name]
    split_anywhere(data, Example(function, [randn(*s) for s in shapes]))


def test_linear_attention_adds_partial_sums_and_gathers_no_token() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-1, -2) @ v)

    x = [randn(2, 8, 3) for _ in range(3)]
    result = split(function, x, {i: evenly(1, 8, 2) for i in range(3)}, 2)
    assert result.roles == {"sum": 1, "output": 1}


# -- attention -------------------------------------------------------------------------------------------------------


@st.composite
def attentions(draw: st.DrawFn) -> Example:
    b, h, length, e = 2, 4, draw(st.integers(4, 6)), 3
    cross = draw(st.booleans())
    keys = draw(st.integers(4, 6)) if cross else length
    grouped = draw(st.booleans())
    heads = 2 if grouped else draw(st.sampled_from([h, h, 1]))
    named: dict[str, Any] = {"enable_gqa": grouped, "scale": draw(st.none() | st.just(0.3))}
    inputs = [randn(b, h, length, e), randn(b, heads, keys, e), randn(b, heads, keys, draw(st.sampled_from([e, 5])))]
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    if kind == "causal":
        named["is_causal"] = True
    if kind in ("bool", "float"):
        full = (b, h, length, keys)
        ndim = draw(st.integers(2, 4))
        shape = [n if draw(st.booleans()) else 1 for n in full[4 - ndim :]]
        mask = randn(*shape)
        if kind == "bool":
            mask = mask > -1
            mask[..., 0] = True
        inputs.append(mask)

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **named)

    promised = {0: (0, 2) if grouped else (0, 1, 2), 1: (0, 2), 2: (0, 2)}
    return Example(function, inputs, promised, title=f"{kind} {named}")


@examples(100)
@given(attentions(), st.data())
def test_attention_is_split_along_samples_heads_and_tokens(example: Example, data: st.DataObject) -> None:
    split_where_promised(data, example)


@examples(100)
@given(attentions(), st.data())
def test_attention_is_right_on_any_cut(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


@examples(40)
@given(attentions(), st.data())
def test_queries_and_keys_may_be_cut_differently(example: Example, data: st.DataObject) -> None:
    world = data.draw(st.integers(2, 4))
    q, k, v = (data.draw(layouts(x.shape, world, dims=[2])) for x in example.inputs[:3])
    result = split(example.function, example.inputs, {0: q, 1: k, 2: v}, world)
    assert set(result.roles) <= {"keys_values", "output"}


@few
@given(data=st.data())
def test_attention_without_a_batch_is_split(data: st.DataObject) -> None:
    split_where_promised(
        data, Example(F.scaled_dot_product_attention, [randn(5, 3), randn(6, 3), randn(6, 3)], {0: (0,), 1: (0,)})
    )


@few
@given(data=st.data())
def test_rotary_embedding_in_complex_numbers_is_split(data: st.DataObject) -> None:
    def rope(x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 7, 3, 4, 2))
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.view_as_real(pairs * turn).flatten(3)

    result = split_where_promised(data, Example(rope, [randn(2, 7, 3, 8), randn(7, 4)], {0: (0, 1, 2), 1: (0,)}))
    assert set(result.roles) <= {"output"}


@few
@given(data=st.data())
def test_rotary_embedding_in_halves_is_split(data: st.DataObject) -> None:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.cat([-right, left], -1) * sin + torch.stack([-b, a], -1).flatten(-2) * sin

    result = split_where_promised(data, Example(rope, [randn(2, 3, 7, 8), randn(7, 8), randn(7, 8)], {0: (0, 1, 2)}))
    assert set(result.roles) <= {"output"}


# -- what no rule knows ----------------------------------------------------------------------------------------------


@few
@given(data=st.data())
def test_an_unknown_operator_gets_whole_operands_and_a_reason(data: st.DataObject) -> None:
    x = randn(5, 5)
    assert split(lambda x: x.digamma(), [x], {0: evenly(0, 5, 2)}, 2, exact=False).fallbacks == [
        "no rule for aten.digamma.default"
    ]
    split_anywhere(
        data, Example(lambda x, y: (torch.cdist(x, y), x.median(), x.aminmax(), x.tril() + y), [x, randn(5, 5)])
    )


# -- where ranks overlap ---------------------------------------------------------------------------------------------


def test_a_dim_that_shrinks_to_one_row_on_every_rank_is_whole() -> None:
    overlapping = cut(2, (0, 3), (1, 4))
    conv = nn.Conv2d(2, 3, (3, 1), stride=(4, 1)).double()  # both ranks hold the centre of the only window
    split(lambda x, y: conv(x) + y, [randn(1, 2, 4, 5), randn(1, 3, 6, 5)], {0: overlapping}, 2)
    split(lambda x, y: conv(x) * y + x[:, :1], [randn(1, 2, 4, 5), randn(1, 1, 4, 5)], {0: overlapping}, 2)


def test_a_join_of_overlapping_parts_that_is_whole_everywhere_is_known_to_be() -> None:
    everywhere = {0: cut(1, (0, 4), (2, 4)), 1: cut(1, (0, 3), (0, 3))}
    result = split(lambda x, y: torch.cat([x, y], 1).flatten(1), [randn(2, 4, 3), randn(2, 3, 3)], everywhere, 2)
    assert result.roles["fallback"] == 0


NOTHING_OF_ITS_OWN = cut(1, (0, 5), (2, 4), (0, 5))  # what ranks 1 and 2 hold, rank 0 holds too


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_row_that_several_ranks_hold_counts_once_in_a_reduction(name: str) -> None:
    split(lambda x: REDUCTIONS[name](x, (1,), False), [randn(3, 5, 6)], {0: NOTHING_OF_ITS_OWN}, 3)


def test_a_row_that_several_ranks_hold_counts_once_in_statistics_and_products() -> None:
    x = randn(3, 5, 6)
    split(nn.LayerNorm([5, 6]).double(), [x], {0: NOTHING_OF_ITS_OWN}, 3)
    split(lambda x: F.group_norm(x.transpose(1, 2), 2), [x], {0: NOTHING_OF_ITS_OWN}, 3)
    split(lambda x: x.transpose(1, 2) @ x, [x], {0: NOTHING_OF_ITS_OWN}, 3)
