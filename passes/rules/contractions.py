"""Matrix products. A split free dim stays split; of two, one operand is fetched; over a split inner dim, sums travel."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from ...ir.layout import Layout, own
from ...ir.program import layout_of, shape_of
from ..partition import CannotSplit, Op, Partitioner
from .pointwise import broadcast_to

aten = torch.ops.aten


def linear(p: Partitioner, op: Op, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    layout = layout_of(x)
    if layout.dim is None or layout_of(weight).split:
        raise CannotSplit("the weight of a linear layer is split")
    if layout.dim != len(shape_of(x)) - 1:
        return p.same(op, (x, weight, bias), layout=layout)
    part = p.same(op, (p.own(x), p.lay(weight, disjoint(layout).at(1))), layout=Layout())
    total = p.reduce(part)
    if bias is None:
        return total
    return p.emit(aten.add.Tensor, (total, bias), shape=op.shape, dtype=op.dtype)


def disjoint(layout: Layout) -> Layout:
    """The same cover with each position on one rank only."""
    return Layout(layout.dim, own(layout.rows))


def product(p: Partitioner, op: Op, a: fx.Node, b: fx.Node) -> fx.Node:
    """`mm`, `bmm` and `matmul` of [..., M, K] and [..., K, N]."""
    ndim_a, ndim_b, ndim = len(shape_of(a)), len(shape_of(b)), len(op.shape)
    if ndim_a < 2 or ndim_b < 2:
        raise CannotSplit("a product with a vector")
    rows, inner_a, inner_b, columns = ndim_a - 2, ndim_a - 1, ndim_b - 2, ndim_b - 1
    la, lb = layout_of(a), layout_of(b)

    # the batch dims: as pointwise
    batch = la.at(la.dim + ndim - ndim_a) if la.dim is not None and la.dim < rows else None
    batch = batch or (lb.at(lb.dim + ndim - ndim_b) if lb.dim is not None and lb.dim < inner_b else None)
    if batch is not None:
        a, b = (broadcast_to(p, x, batch, ndim) for x in (a, b))
        return p.same(op, (a, b), layout=batch)

    # the inner dim: partial sums, unless the other operand is split along a free dim, which then stays
    if la.dim == inner_a and lb.dim in (None, inner_b) or lb.dim == inner_b and la.dim in (None, inner_a):
        inner = disjoint(la if la.dim is not None else lb)
        a, b = p.lay(a, inner.at(inner_a), "realign"), p.lay(b, inner.at(inner_b), "realign")
        return p.reduce(p.same(op, (a, b), layout=Layout()))
    if la.dim == inner_a:
        a, la = p.whole(a, "keys_values"), Layout()
    if lb.dim == inner_b:
        b, lb = p.whole(b, "keys_values"), Layout()

    # the free dims: one may stay split
    if la.dim == rows and lb.dim == columns:
        if prod(shape_of(b)) <= prod(shape_of(a)):
            b, lb = p.whole(b, "keys_values"), Layout()
        else:
            a, la = p.whole(a, "keys_values"), Layout()
    layout = la.at(ndim - 2) if la.dim == rows else lb.at(ndim - 1)
    return p.same(op, (a, b), layout=layout)


def product_plus(p: Partitioner, op: Op, added: fx.Node, a: fx.Node, b: fx.Node, **scales: Any) -> fx.Node:
    """`addmm` and `baddbmm`: beta * added + alpha * (a @ b)."""
    beta, alpha = scales.get("beta", 1), scales.get("alpha", 1)
    target = aten.mm.default if op.target is aten.addmm.default else aten.bmm.default
    if not (layout_of(a).split or layout_of(b).split):
        total = p.emit(target, (a, b), shape=op.shape, dtype=op.dtype)
    else:
        total = product(p, Op(op.node, target), a, b)
    if alpha != 1:
        total = p.emit(aten.mul.Scalar, (total, alpha), shape=op.shape, dtype=op.dtype, layout=layout_of(total))
    if beta == 0:
        return total
    layout = layout_of(total)
    added = broadcast_to(p, added, layout, len(op.shape)) if layout.split else p.whole(added, "realign")
    return p.emit(aten.add.Tensor, (total, added), {"alpha": beta}, shape=op.shape, dtype=op.dtype, layout=layout)


TABLE = {
    aten.linear.default: linear,
    aten.mm.default: product,
    aten.bmm.default: product,
    aten.matmul.default: product,
    aten.addmm.default: product_plus,
    aten.baddbmm.default: product_plus,
}
