"""The normal form of every operator that has a simpler word: views, cuts and joints, copies, padding, windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from ..ir.program import shape_of
from .builder import Builder, unpacked
from .einsum import einsum

aten = torch.ops.aten


Form = Callable[..., Any]


# -- views ------------------------------------------------------------------------------------------------------


def _to_result_shape(b: Builder, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return b.reshape(x, shape_of(node))


def _transpose(b: Builder, node: fx.Node, x: fx.Node, *dims: int) -> fx.Node:
    order = list(range(len(shape_of(x))))
    first, second = dims or ((0, 1) if len(order) == 2 else (0, 0))
    order[first], order[second] = order[second], order[first]
    return b.permute(x, order)


def _permute(b: Builder, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    return b.permute(x, dims)


def _expand(b: Builder, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    shape = shape_of(node)
    return x if shape == shape_of(x) else b.emit(aten.expand.default, x, list(shape))


def _repeat(b: Builder, node: fx.Node, x: fx.Node, repeats: Sequence[int]) -> fx.Node:
    shape = (1,) * (len(repeats) - len(shape_of(x))) + shape_of(x)
    pairs = [d for n in shape for d in (1, n)]
    wide = [d for r, n in zip(repeats, shape, strict=True) for d in (r, n)]
    return b.reshape(b.emit(aten.expand.default, b.reshape(x, pairs), wide), shape_of(node))


def _repeat_interleave(
    b: Builder, node: fx.Node, x: fx.Node, repeats: int, dim: int | None = None, **_: Any
) -> fx.Node:
    if dim is None:
        x, dim = b.reshape(x, [prod(shape_of(x))]), 0
    shape, dim = shape_of(x), dim % len(shape_of(x))
    wide = [*shape[: dim + 1], repeats, *shape[dim + 1 :]]
    thin = [*shape[: dim + 1], 1, *shape[dim + 1 :]]
    return b.reshape(b.emit(aten.expand.default, b.reshape(x, thin), wide), shape_of(node))


def _pixel_shuffle(b: Builder, node: fx.Node, x: fx.Node, r: int) -> fx.Node:
    *lead, c, h, w = shape_of(x)
    n = len(lead)
    y = b.reshape(x, [*lead, c // (r * r), r, r, h, w])
    return b.reshape(b.permute(y, [*range(n + 1), n + 3, n + 1, n + 4, n + 2]), shape_of(node))


def _pixel_unshuffle(b: Builder, node: fx.Node, x: fx.Node, r: int) -> fx.Node:
    *lead, c, h, w = shape_of(x)
    n = len(lead)
    y = b.reshape(x, [*lead, c, h // r, r, w // r, r])
    return b.reshape(b.permute(y, [*range(n + 1), n + 2, n + 4, n + 1, n + 3]), shape_of(node))


# -- cuts and joints --------------------------------------------------------------------------------------------


def _slice(
    b: Builder, node: fx.Node, x: fx.Node, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> fx.Node:
    dim = dim % len(shape_of(x))
    return b.slice(x, dim, *slice(start, end, step).indices(shape_of(x)[dim]))


def _select(b: Builder, node: fx.Node, x: fx.Node, dim: int, index: int) -> fx.Node:
    dim = dim % len(shape_of(x))
    index = index % shape_of(x)[dim]
    return b.reshape(b.slice(x, dim, index, index + 1), shape_of(node))


def _unbind(b: Builder, node: fx.Node, x: fx.Node, dim: int = 0) -> tuple[fx.Node, ...]:
    dim = dim % len(shape_of(x))
    shape = shape_of(x)[:dim] + shape_of(x)[dim + 1 :]
    return tuple(b.reshape(b.slice(x, dim, i, i + 1), shape) for i in range(shape_of(x)[dim]))


def _split(b: Builder, node: fx.Node, x: fx.Node, size: Any, dim: int = 0) -> tuple[fx.Node, ...]:
    dim = dim % len(shape_of(x))
    length = shape_of(x)[dim]
    sizes = [min(size, length - i) for i in range(0, length, size)] if isinstance(size, int) else list(size)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(b.slice(x, dim, end - n, end) for n, end in zip(sizes, ends, strict=True))


def _stack(b: Builder, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    dim = dim % len(shape_of(node))
    shape = [1 if d == dim else s for d, s in enumerate(shape_of(node))]
    return b.cat([b.reshape(x, shape) for x in tensors], dim)


def _cat(b: Builder, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    return b.cat(tensors, dim % len(shape_of(node)))


def _slice_scatter(
    b: Builder,
    node: fx.Node,
    x: fx.Node,
    source: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> fx.Node:
    dim = dim % len(shape_of(x))
    start, end, step = slice(start, end, step).indices(shape_of(x)[dim])
    if step != 1:
        return b.emit(aten.slice_scatter.default, x, source, dim, start, end, step)
    parts = [b.slice(x, dim, 0, start), source, b.slice(x, dim, end, shape_of(x)[dim])]
    return b.cat(parts, dim)


def _select_scatter(b: Builder, node: fx.Node, x: fx.Node, source: fx.Node, dim: int, index: int) -> fx.Node:
    dim = dim % len(shape_of(x))
    index = index % shape_of(x)[dim]
    shape = [1 if d == dim else s for d, s in enumerate(shape_of(x))]
    return _slice_scatter(b, node, x, b.reshape(source, shape), dim, index, index + 1)


# -- copies -----------------------------------------------------------------------------------------------------


def _itself(b: Builder, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return x


def _clone(b: Builder, node: fx.Node, x: fx.Node, *, memory_format: Any = None, **_: Any) -> fx.Node:
    """Kept where it changes the order in memory: a convolution would else do it for its weights, at every call."""
    if memory_format in (None, torch.preserve_format) or x.meta["val"].is_contiguous(memory_format=memory_format):
        return x
    return b.emit(aten.clone.default, x, memory_format=memory_format)


def _to_copy(b: Builder, node: fx.Node, x: fx.Node | float, **kwargs: Any) -> fx.Node:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if not isinstance(x, fx.Node):  # vmap leaves numbers in the place of tensors
        return b.copy(aten.full.default, ([], x), {"dtype": dtype or node.meta["dtype"]}, node.meta["val"])
    if dtype in (None, x.meta["dtype"]) and device in (None, x.meta["val"].device):
        return x
    kept = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    return b.emit(aten._to_copy.default, x, **kept)


def _type_as(b: Builder, node: fx.Node, x: fx.Node, other: fx.Node) -> fx.Node:
    return _to_copy(b, node, x, dtype=other.meta["dtype"])


def _copy(b: Builder, node: fx.Node, x: fx.Node, source: fx.Node, *_: Any) -> fx.Node:
    return _to_copy(b, node, _expand(b, node, source), dtype=x.meta["dtype"])


def _diagonal(b: Builder, node: fx.Node, x: fx.Node, offset: int = 0, dim1: int = 0, dim2: int = 1) -> fx.Node:
    """Every (columns + 1)-th of the flattened matrix."""
    ndim = len(shape_of(x))
    dim1, dim2 = dim1 % ndim, dim2 % ndim
    x = b.permute(x, [*(d for d in range(ndim) if d not in (dim1, dim2)), dim1, dim2])
    *lead, rows, columns = shape_of(x)
    length = shape_of(node)[-1]
    start = offset if offset >= 0 else -offset * columns
    x = b.reshape(x, [*lead, rows * columns])
    return b.slice(x, ndim - 2, start, min(start + length * (columns + 1), rows * columns), columns + 1)


def _roll(b: Builder, node: fx.Node, x: fx.Node, shifts: Sequence[int], dims: Sequence[int] | None = None) -> fx.Node:
    if dims:
        return b.emit(aten.roll.default, x, shifts, dims)
    flat = b.reshape(x, [prod(shape_of(x))])
    return b.reshape(b.emit(aten.roll.default, flat, shifts, [0]), shape_of(x))


def _index_put(
    b: Builder, node: fx.Node, x: fx.Node, indices: Sequence[Any], values: fx.Node, accumulate: bool = False
) -> fx.Node:
    """One value where a mask is true is a choice."""
    mask = indices[0]
    single = len(indices) == 1 and mask.meta["dtype"] == torch.bool and prod(shape_of(values)) == 1
    if not single or accumulate:
        return b.emit(aten.index_put.default, x, indices, values, accumulate)
    mask = b.reshape(mask, [*shape_of(mask), *(1,) * (len(shape_of(x)) - len(shape_of(mask)))])
    return b.emit(aten.where.self, mask, _to_copy(b, node, b.reshape(values, []), dtype=x.meta["dtype"]), x)


# -- look-ups ---------------------------------------------------------------------------------------------------


def _take_along_dim(b: Builder, node: fx.Node, x: fx.Node, indices: fx.Node, dim: int | None = None) -> fx.Node:
    if dim is None:
        x, indices = (b.reshape(t, [prod(shape_of(t))]) for t in (x, indices))
    shapes = [list(shape_of(t)) for t in (x, indices)]
    dim = (dim or 0) % len(shapes[0])
    for d, sizes in enumerate(zip(*shapes, strict=True)):
        if d != dim:
            shapes[0][d] = shapes[1][d] = max(sizes)
    wide = [
        t if list(shape_of(t)) == shape else b.emit(aten.expand.default, t, shape)
        for t, shape in zip((x, indices), shapes, strict=True)
    ]
    return b.emit(aten.gather.default, wide[0], dim, wide[1])


# -- padding and products -----------------------------------------------------------------------------------------


def _pad(
    b: Builder, node: fx.Node, x: fx.Node, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    if not any(pad):
        return x
    if mode == "constant":
        for i, amount in enumerate(pad):
            if amount < 0:
                dim = len(shape_of(x)) - 1 - i // 2
                size = shape_of(x)[dim]
                x = b.slice(x, dim, 0, size + amount) if i % 2 else b.slice(x, dim, -amount, size)
        pad = [max(amount, 0) for amount in pad]
        if not any(pad):
            return x
        return b.emit(aten.constant_pad_nd.default, x, list(pad), 0 if value is None else value)
    return b.emit(aten.pad.default, x, list(pad), mode)


def _pad_sequence(
    b: Builder, node: fx.Node, sequences: Sequence[fx.Node], batch_first: bool = False, value: float = 0.0,
    side: str = "right",
) -> fx.Node:  # fmt: skip
    length = max(shape_of(x)[0] for x in sequences)

    def padded(x: fx.Node) -> fx.Node:
        missing = [0, length - shape_of(x)[0]]
        ends = missing if side == "right" else missing[::-1]
        return _pad(b, node, x, [0] * (2 * len(shape_of(x)) - 2) + ends, "constant", value)

    return _stack(b, node, [padded(x) for x in sequences], 0 if batch_first else 1)


def _mirrored(mode: str) -> Form:
    return lambda b, node, x, pad: _pad(b, node, x, pad, mode)


# -- statistics -------------------------------------------------------------------------------------------------


def _variance(root: bool, mean: bool) -> Form:
    """Every form of var, std, var_mean and std_mean is one of `var.correction` and `var_mean.correction`."""

    def form(b: Builder, node: fx.Node, x: fx.Node, *args: Any, **named: Any) -> Any:
        if node.target._overloadname == "correction":  # type: ignore[union-attr]
            dims, correction = args[0] if args else named.get("dim"), named.get("correction")
        else:  # (dims, unbiased, keepdim) or (unbiased)
            flags = list(args)
            dims = flags.pop(0) if node.target._overloadname == "dim" else None  # type: ignore[union-attr]
            correction = int(flags.pop(0) if flags else named.get("unbiased", True))
            named = {"keepdim": flags[0]} if flags else named
        target = aten.var_mean.correction if mean else aten.var.correction
        keepdim = named.get("keepdim", False)
        kwargs = {"correction": 1 if correction is None else correction, "keepdim": keepdim}
        results = unpacked(b, b.emit(target, x, dims, **kwargs))
        first, *rest = results if mean else (results,)
        first = b.emit(aten.sqrt.default, first) if root else first
        return (first, *rest) if mean else first

    return form


def _batch_norm(
    b: Builder, node: fx.Node, x: fx.Node, weight: Any, bias: Any, mean: Any, variance: Any, training: bool,
    momentum: float, eps: float,
) -> Any:  # fmt: skip
    args = (x, weight, bias, mean, variance, training, momentum, eps)
    if training:
        return unpacked(b, b.copy(node.target, args, {}, node.meta["val"]))
    return b.emit(aten.batch_norm.default, *args, False), None, None


def _instance_norm(
    b: Builder, node: fx.Node, x: fx.Node, weight: Any, bias: Any, mean: Any, variance: Any, own: bool,
    momentum: float, eps: float, cudnn: bool,
) -> Any:  # fmt: skip
    """A group norm of one channel each, or with given statistics a batch norm."""
    if not own:
        return b.emit(aten.batch_norm.default, x, weight, bias, mean, variance, False, momentum, eps, cudnn)
    return b.emit(aten.group_norm.default, x, shape_of(x)[1], weight, bias, eps, cudnn)


# -- windows ----------------------------------------------------------------------------------------------------


def _convolution(transposed: bool) -> Form:
    def form(
        b: Builder, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, *rest: Any, **named: Any
    ) -> fx.Node:
        order = ["stride", "padding"] + (
            ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
        )
        given = dict(zip(order, rest, strict=False)) | named
        spatial = len(shape_of(weight)) - 2

        def each(name: str, default: int) -> list[int]:
            value = given.get(name, default)
            values = [value] if isinstance(value, int) else list(value)
            return values * spatial if len(values) == 1 else values

        stride, dilation = each("stride", 1), each("dilation", 1)
        if given.get("padding") in ("same", "valid"):
            total = [d * (k - 1) for d, k in zip(dilation, shape_of(weight)[2:], strict=True)]
            total = total if given["padding"] == "same" else [0] * spatial
            padding = [t // 2 for t in total]
            uneven = [v for t in reversed(total) for v in (0, t % 2)]
            x = b.emit(aten.constant_pad_nd.default, x, uneven) if any(uneven) else x
        else:
            padding = each("padding", 0)
        batched = len(shape_of(x)) == spatial + 2
        x = x if batched else b.reshape(x, (1, *shape_of(x)))
        y = b.emit(
            aten.convolution.default, x, weight, bias, stride, padding, dilation, transposed,
            each("output_padding", 0), given.get("groups", 1),
        )  # fmt: skip
        return b.reshape(y, shape_of(node))

    return form


def _upsample(names: tuple[str, ...]) -> Form:
    """`.vec` forms take a size or scale factors; the explicit forms take the size and, after the flags, scales."""

    def form(b: Builder, node: fx.Node, x: fx.Node, *args: Any, **named: Any) -> fx.Node:
        given = dict(zip(("output_size", *names, "scale_factors"), args, strict=False)) | named
        size = list(shape_of(node)[2:])
        flags = [given[name] for name in names]
        scales = [None] * len(size) if given.get("output_size") is not None else list(given["scale_factors"])
        return b.emit(node.target.overloadpacket.default, x, size, *flags, *scales)  # type: ignore[union-attr]

    return form


def _extreme(reduce: Any) -> Form:
    """`x.max()` and `x.min()` over everything."""
    return lambda b, node, x: b.emit(reduce, x, list(range(len(shape_of(x)))), False)


FORMS: dict[Any, Form] = {
    **{
        target: _to_result_shape
        for packet in (
            aten.view,
            aten._unsafe_view,
            aten.reshape,
            aten.unsqueeze,
            aten.squeeze,
            aten.flatten,
            aten.unflatten,
        )
        for target in (getattr(packet, o) for o in packet.overloads() if "out" not in o and o != "dtype")
    },
    aten.view_as.default: _to_result_shape,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.slice.Tensor: _slice,
    aten.narrow.default: lambda b, node, x, dim, start, length: _slice(b, node, x, dim, start, start + length),
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.concatenate.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.clone.default: _clone,
    aten.alias.default: _itself,
    aten.detach.default: _itself,
    aten.detach_.default: _itself,
    aten.contiguous.default: lambda b, node, x, **_: _clone(b, node, x, memory_format=torch.contiguous_format),
    aten.lift_fresh_copy.default: _itself,
    aten.lift_fresh.default: _itself,
    aten._to_copy.default: _to_copy,
    aten.type_as.default: _type_as,
    aten.copy.default: _copy,
    aten.take_along_dim.default: _take_along_dim,
    aten.diagonal.default: _diagonal,
    aten.roll.default: _roll,
    aten.index_put.default: _index_put,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: lambda b, node, x, pad, value=0: _pad(b, node, x, pad, "constant", value),
    **{getattr(aten, f"reflection_pad{n}d").default: _mirrored("reflect") for n in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{n}d").default: _mirrored("replicate") for n in (1, 2, 3)},
    aten.pad_sequence.default: _pad_sequence,
    aten.einsum.default: einsum,
    **{
        getattr(getattr(aten, name), overload): _variance("std" in name, "mean" in name)
        for name in ("var", "std", "var_mean", "std_mean")
        for overload in ("default", "dim", "correction")
    },
    aten.max.default: _extreme(aten.amax.default),
    aten.min.default: _extreme(aten.amin.default),
    aten.native_batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
    aten.conv1d.default: _convolution(False),
    aten.conv2d.default: _convolution(False),
    aten.conv3d.default: _convolution(False),
    aten.conv1d.padding: _convolution(False),
    aten.conv2d.padding: _convolution(False),
    aten.conv3d.padding: _convolution(False),
    aten.conv_transpose1d.default: _convolution(True),
    aten.conv_transpose2d.input: _convolution(True),
    aten.conv_transpose3d.input: _convolution(True),
    aten.upsample_nearest1d.vec: _upsample(()),
    aten.upsample_nearest2d.vec: _upsample(()),
    aten.upsample_nearest3d.vec: _upsample(()),
    aten._upsample_nearest_exact1d.vec: _upsample(()),
    aten._upsample_nearest_exact2d.vec: _upsample(()),
    aten._upsample_nearest_exact3d.vec: _upsample(()),
    aten.upsample_linear1d.vec: _upsample(("align_corners",)),
    aten.upsample_bilinear2d.vec: _upsample(("align_corners",)),
    aten.upsample_trilinear3d.vec: _upsample(("align_corners",)),
    aten.upsample_bicubic2d.vec: _upsample(("align_corners",)),
    aten._upsample_bilinear2d_aa.vec: _upsample(("align_corners",)),
    aten._upsample_bicubic2d_aa.vec: _upsample(("align_corners",)),
}
