"""Pointwise operators, views, slices and look-ups against law 1: cut where the rule promises it, and anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import cut, evenly, split
from tests.properties import examples, few, given, some

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
    "conjugate pairs": (
        lambda x: torch.view_as_real(torch.view_as_complex(x).conj().resolve_conj()),
        (2, 5, 6, 2),
        (0, 1, 2),
    ),
    "imaginary pairs": (lambda x: torch.view_as_complex(x).conj()[:, :1].imag.exp(), (2, 5, 6, 2), (0, 1, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
@few
@given(data=st.data())
def test_views_keep_any_cut(name: str, data: st.DataObject) -> None:
    function, shape, dims = VIEWS[name]
    result = split_where_promised(data, Example(function, [randn(*shape)], {0: dims}))
    assert set(result.roles) <= {"output", "realign", "small"}
    assert "realign" not in result.roles or "heads" in name or "pairs" in name


def relative_shift(x: Tensor) -> Tensor:
    """Scores by relative position to scores by position: row i of [n, 2n-1], from place n-1-i on."""
    b, h, n, _ = x.shape
    x = torch.cat([x.new_zeros(b, h, n, 1), x], -1)
    return x.view(b, h, 2 * n, n)[:, :, 1:].reshape(b, h, n, 2 * n - 1)[..., :n]


MIXED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "relative shift": (relative_shift, (2, 3, 6, 11), (0, 1, 2)),
    "rows of another length": (lambda x: x.reshape(2, 9, 8) * 1, (2, 6, 12), (0, 1)),
    "rows of many": (lambda x: x.reshape(4, 18) * 1, (1, 24, 3), (1,)),
    "a dim in front": (lambda x: x.reshape(2, 1, 5, 7, 2) * 1, (2, 7, 5, 2), (0, 1, 3)),
}


@pytest.mark.parametrize("name", MIXED)
@few
@given(data=st.data())
def test_a_reshape_that_mixes_rows_gets_the_rows_it_lacks(name: str, data: st.DataObject) -> None:
    function, shape, dims = MIXED[name]
    result = split_where_promised(data, Example(function, [randn(*shape)], {0: dims}))
    assert set(result.roles) <= {"output", "halo", "realign"}


def test_the_relative_shift_fetches_one_row_of_scores_from_the_next_rank() -> None:
    result = split(relative_shift, (randn(2, 3, 8, 15),), {0: evenly(2, 8, 4)}, 4)
    (halo,) = [each for each in result.exchanges if each.role == "halo"]
    assert halo.numel(1, 0) == 2 * 3 * 8
    assert halo.numel(2, 0) == halo.numel(0, 1) == 0


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
def test_cuts_between_groups_of_rows_pass_a_reshape_without_communication(
    function: Any, shape: Any, layout: Any
) -> None:
    result = split(function, [randn(*shape)], {0: layout}, 2)
    assert result.roles == {"output": 1}
    assert result.layouts[0].split


@pytest.mark.parametrize("function", [pack, windows, lambda x: F.pixel_unshuffle(x, 2)])
def test_cuts_within_groups_of_rows_are_realigned(function: Any) -> None:
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
    "concat and concatenate": (
        lambda x, y: torch.concatenate([torch.concat([x, y], 1), x], 1),
        [(2, 7, 6), (2, 4, 6)],
        {0: (0, 1, 2), 1: (0, 1, 2)},
    ),
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
    "circular 3d": (lambda x: F.pad(x, (1, 2, 0, 1, 2, 1), mode="circular"), [(1, 2, 4, 5, 3)], {0: (1, 2, 3, 4)}),
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
def test_operators_that_only_move_rows_exchange_nothing(name: str) -> None:
    function, shapes, _ = SLICING[name]
    for dim in (1, 2):
        result = split(function, [randn(*s) for s in shapes], {0: evenly(dim, shapes[0][dim], 2)}, 2)
        assert set(result.roles) == {"output"}


# -- look-ups --------------------------------------------------------------------------------------------------------

INDEXING: dict[str, tuple[Any, list[Any], dict[int, tuple[int, ...]]]] = {
    "embedding": (lambda t, i: F.embedding(i, t), [(9, 4), (2, 7)], {1: (0, 1)}),
    "one_hot": (lambda t, i: F.one_hot(i, 9).to(t) @ t, [(9, 4), (2, 7)], {1: (0, 1)}),
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


@pytest.mark.parametrize("name", ["slice", "unbind", "split", "cat"])
def test_an_operator_without_a_dim_acts_along_its_default_one(name: str) -> None:
    calls = {
        "slice": lambda x: torch.ops.aten.slice.Tensor(x, end=3),
        "unbind": lambda x: torch.ops.aten.unbind.int(x)[1],
        "split": lambda x: torch.ops.aten.split.Tensor(x, 2)[1],
        "cat": lambda x: torch.ops.aten.cat.default([x, x + 1]),
    }
    split(calls[name], [randn(4, 5)], {0: evenly(1, 5, 2)}, 2)
