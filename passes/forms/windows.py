"""Convolutions, adaptive max pooling, and interpolation, which gets explicit sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.operators import OpSpec
from ...ir.program import shape_of
from ..builder import Builder, Form, unpacked

aten = torch.ops.aten


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
    """`.vec` overloads take a size or scale factors; the default ones take (size, flags…, scales…)."""

    def form(b: Builder, node: fx.Node, x: fx.Node, *args: Any, **named: Any) -> fx.Node:
        given = dict(zip(("output_size", *names, "scale_factors"), args, strict=False)) | named
        size = list(shape_of(node)[2:])
        flags = [given[name] for name in names]
        scales = [None] * len(size) if given.get("output_size") is not None else list(given["scale_factors"])
        return b.emit(node.target.overloadpacket.default, x, size, *flags, *scales)

    return form


def adaptive_max(b: Builder, node: fx.Node, x: fx.Node, size: list[int]) -> Any:
    """Windows of one size become `max_pool`, others slices and `amax`. Kept if the positions of the maxima are used."""
    if any(user.args[1] == 1 and user.users for user in node.users):
        return unpacked(b, b.copy(node.target, (x, size), {}, node.meta["val"]))
    spatial = len(shape_of(x)) - len(size)
    kernel = [1 if n == 1 or shape_of(x)[d] % n else shape_of(x)[d] // n for d, n in enumerate(size, spatial)]
    if any(k > 1 for k in kernel):
        x = b.emit(getattr(aten, f"max_pool{len(size)}d").default, x, kernel)
    for d, n in enumerate(size, spatial):
        length = shape_of(x)[d]
        if n != length:
            windows = [b.slice(x, d, i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
            x = b.cat([b.emit(aten.amax.default, window, [d], True) for window in windows], d)
    return x, None


TABLE = {
    aten.conv1d.default: OpSpec(form=_convolution(False)),
    aten.conv2d.default: OpSpec(form=_convolution(False)),
    aten.conv3d.default: OpSpec(form=_convolution(False)),
    aten.conv1d.padding: OpSpec(form=_convolution(False)),
    aten.conv2d.padding: OpSpec(form=_convolution(False)),
    aten.conv3d.padding: OpSpec(form=_convolution(False)),
    aten.conv_transpose1d.default: OpSpec(form=_convolution(True)),
    aten.conv_transpose2d.input: OpSpec(form=_convolution(True)),
    aten.conv_transpose3d.input: OpSpec(form=_convolution(True)),
    aten.upsample_nearest1d.vec: OpSpec(form=_upsample(())),
    aten.upsample_nearest2d.vec: OpSpec(form=_upsample(())),
    aten.upsample_nearest3d.vec: OpSpec(form=_upsample(())),
    aten._upsample_nearest_exact1d.vec: OpSpec(form=_upsample(())),
    aten._upsample_nearest_exact2d.vec: OpSpec(form=_upsample(())),
    aten._upsample_nearest_exact3d.vec: OpSpec(form=_upsample(())),
    aten.upsample_linear1d.vec: OpSpec(form=_upsample(("align_corners",))),
    aten.upsample_bilinear2d.vec: OpSpec(form=_upsample(("align_corners",))),
    aten.upsample_trilinear3d.vec: OpSpec(form=_upsample(("align_corners",))),
    aten.upsample_bicubic2d.vec: OpSpec(form=_upsample(("align_corners",))),
    aten._upsample_bilinear2d_aa.vec: OpSpec(form=_upsample(("align_corners",))),
    aten._upsample_bicubic2d_aa.vec: OpSpec(form=_upsample(("align_corners",))),
}
