"""Matrix products, written as einsum: one rule for linear, mm, bmm, matmul, einsum and cdist.

If a split letter is in the output, the output is split along it; operands without that letter are fetched whole. If the
split letter is summed over, each rank computes a partial sum, and the ranks' sums are added (role `sum`).

Three exchanges of hand-written attention may be stale: the keys of a product that leads to a softmax, the values of a
product with the result of a softmax, and sums over tokens that both operands have, as in linear attention. Others are
never stale, because nothing is known of how the product uses an operand.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from ...capture import row_rules as rows
from ...ir.layout import Layout, owned
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import products
from ..partition import Op, Partitioner, SplitError
from .attention import is_key_or_value
from .pointwise import broadcast_to

aten = torch.ops.aten
Shape = Sequence[int]


def contract(
    p: Partitioner,
    op: Op,
    operands: Sequence[fx.Node],
    letters: Sequence[str],
    output: str,
    rebuild: Callable[[list[fx.Node]], tuple[Any, ...]],
) -> fx.Node:
    """The product of `operands`, whose dims are named by `letters`. `rebuild` returns the operator's arguments."""
    split = [
        (word[layout.axis], layout) for x, word in zip(operands, letters, strict=True) if (layout := layout_of(x)).split
    ]
    # if several letters of the output are split, the first operand's stays: queries stay split, keys are fetched
    lead, layout = next(((s, at) for s, at in split if s in output), split[0])
    free = lead in output
    rows = layout.rows if free else owned(layout.rows)
    laid: list[fx.Node] = []
    for x, word in zip(operands, letters, strict=True):
        others = [y for y in operands if y is not x]
        if lead in word:
            laid.append(p.lay(x, Layout(word.index(lead), rows), "realign", "operands cut differently"))
        elif layout_of(x).split and is_key_or_value(op.node, word[layout_of(x).axis] in output, others):
            laid.append(p.whole(x, "keys_values", may_be_stale=True))
        else:
            laid.append(p.whole(x, "realign", "a matrix product uses all rows"))
    if free:
        return p.same(op, rebuild(laid), layout=Layout(output.index(lead), rows))
    tokens = sum(s == lead for s, _ in split) > 1
    return p.reduce(p.same(op, rebuild(laid), layout=Layout()), may_be_stale=tokens)


def linear(p: Partitioner, op: Op, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    if layout_of(weight).split:
        raise SplitError("the weight of a linear layer is split")
    bias = p.whole(bias, "realign", "the bias of a linear layer is used whole") if bias is not None else None
    if not layout_of(x).split:
        return p.same(op, (x, weight, bias), layout=layout_of(x))
    ndim = len(shape_of(x))
    lead = string.ascii_lowercase[: ndim - 1]
    summed = layout_of(x).dim == ndim - 1
    extra = () if summed or bias is None else (bias,)
    y = contract(p, op, (x, weight), (lead + "k", "nk"[2 - len(shape_of(weight)) :]),
                 (lead + "n")[: len(op.shape)], lambda ab: (*ab, *extra))  # fmt: skip
    if not summed or bias is None:
        return y
    return p.emit(aten.add.Tensor, (y, bias), shape=op.shape, dtype=op.dtype)


def product(p: Partitioner, op: Op, a: fx.Node, b: fx.Node) -> fx.Node:
    """`mm`, `bmm` and `matmul` of [..., M, K] and [..., K, N]. Batch dims broadcast."""
    if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
        raise SplitError("one operand is a vector")
    batch, words = _batched((a, "MK"), (b, "KN"))
    return contract(p, op, (a, b), words, batch + "MN", tuple)


def packed_product(p: Partitioner, op: Op, x: fx.Node, weight: fx.Node, scales: fx.Node) -> fx.Node:
    """`_weight_int8pack_mm` of [M, K] and an integer weight [N, K] with one scale per output channel."""
    if layout_of(weight).split or layout_of(scales).split or layout_of(x).dim == 1:
        raise SplitError("with packed weights, only the rows can be split")
    return p.same(op, (x, weight, scales), layout=layout_of(x))


def _batched(*operands: tuple[fx.Node, str]) -> tuple[str, list[str]]:
    """Letters for the batch dims and for each operand. Dims of size 1 broadcast and get the letter `_`."""
    batch = string.ascii_lowercase[: max(len(shape_of(x)) for x, _ in operands) - 2]
    words = []
    for x, ends in operands:
        lead = batch[len(batch) - (len(shape_of(x)) - 2) :]
        words.append("".join("_" if n == 1 else c for c, n in zip(lead, shape_of(x), strict=False)) + ends)
    return batch, words


def product_plus(p: Partitioner, op: Op, added: fx.Node, a: fx.Node, b: fx.Node, **scales: Any) -> fx.Node:
    """`addmm` and `baddbmm`: beta * added + alpha * (a @ b)."""
    beta, alpha = scales.get("beta", 1), scales.get("alpha", 1)
    target = aten.mm.default if op.target is aten.addmm.default else aten.bmm.default
    if layout_of(a).split or layout_of(b).split:
        total = product(p, Op(op.node, target), a, b)
    else:
        total = p.emit(target, (a, b), shape=op.shape, dtype=op.dtype)
    layout = layout_of(total)
    if alpha != 1:
        total = p.emit(aten.mul.Scalar, (total, alpha), shape=op.shape, dtype=op.dtype, layout=layout)
    if beta == 0:
        return total
    added = broadcast_to(p, added, layout, len(op.shape)) if layout.split else p.whole(added, "realign")
    return p.emit(aten.add.Tensor, (total, added), {"alpha": beta}, shape=op.shape, dtype=op.dtype, layout=layout)


def einsum(p: Partitioner, op: Op, equation: str, operands: Sequence[fx.Node], **_: Any) -> fx.Node:
    inputs, output = equation.split("->")
    words = inputs.split(",")
    if any(len(set(word)) < len(word) for word in words):
        raise SplitError(f"the equation {equation!r} takes a diagonal")
    words = [
        "".join("_" if n == 1 else c for c, n in zip(word, shape_of(x), strict=True))  # dims of size 1 broadcast
        for word, x in zip(words, operands, strict=True)
    ]
    return contract(p, op, operands, words, output, lambda xs: (equation, xs))


def distances(p: Partitioner, op: Op, a: fx.Node, b: fx.Node, norm: float = 2, mode: int | None = None) -> fx.Node:
    """`cdist` of [..., M, K] and [..., N, K]. torch chooses the algorithm by M and N of the whole operands."""
    if any(layout_of(x).dim == len(shape_of(x)) - 1 for x in (a, b)):
        raise SplitError("the coordinates are split")
    batch, words = _batched((a, "MK"), (b, "NK"))
    if not mode:
        mode = 1 if max(op.shape[-2:]) > 25 else 2
    return contract(p, op, (a, b), words, batch + "MN", lambda ab: (*ab, norm, mode))


def _product_flops(out: Shape, a: Shape, *_: Any) -> int:
    return 2 * prod(out) * a[-1]


def _product_plus_flops(out: Shape, added: Shape, a: Shape, *_: Any) -> int:
    return 2 * prod(out) * a[-1]


def _einsum_flops(out: Shape, equation: str, operands: Sequence[Shape], *_: Any) -> int:
    words = equation.split("->")[0].split(",")
    sizes = {
        letter: n for word, shape in zip(words, operands, strict=True) for letter, n in zip(word, shape, strict=True)
    }
    return 2 * prod(sizes.values()) if len(words) > 1 else 0


TABLE = {
    aten.linear.default: OpSpec(linear, flops=_product_flops, row_wise=rows.product),
    aten.mm.default: OpSpec(product, flops=_product_flops, row_wise=rows.product),
    aten.bmm.default: OpSpec(product, flops=_product_flops),
    aten.matmul.default: OpSpec(product, flops=_product_flops, row_wise=rows.product),
    aten.addmm.default: OpSpec(product_plus, flops=_product_plus_flops, row_wise=rows.product),
    aten.baddbmm.default: OpSpec(product_plus, flops=_product_plus_flops),
    aten.einsum.default: OpSpec(einsum, form=products.einsum, flops=_einsum_flops),
    aten._int_mm.default: OpSpec(product, flops=_product_flops),
    aten._weight_int8pack_mm.default: OpSpec(packed_product, flops=_product_flops),
    aten._weight_int4pack_mm.default: OpSpec(flops=_product_flops),
    aten._weight_int4pack_mm_for_cpu.default: OpSpec(flops=_product_flops),
    aten._dyn_quant_matmul_4bit.default: OpSpec(flops=_product_flops),
    aten._scaled_mm.default: OpSpec(flops=_product_flops),
    aten.cdist.default: OpSpec(distances, flops=_product_flops),
}
