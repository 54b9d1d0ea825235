"""Variances, extremes over all elements, and norms with given or computed statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.operators import OpSpec
from ...ir.program import shape_of
from ..builder import Builder, Form, unpacked

aten = torch.ops.aten


def variance(arguments: Callable[..., tuple[Any, float, bool]], *, root: bool, mean: bool) -> Form:
    """All overloads of var, std, var_mean and std_mean become `var.correction` or `var_mean.correction`."""

    def form(b: Builder, node: fx.Node, x: fx.Node, *args: Any, **named: Any) -> Any:
        dims, correction, keepdim = arguments(*args, **named)
        target = aten.var_mean.correction if mean else aten.var.correction
        results = unpacked(b, b.emit(target, x, dims, correction=correction, keepdim=keepdim))
        first, *rest = results if mean else (results,)
        first = b.emit(aten.sqrt.default, first) if root else first
        return (first, *rest) if mean else first

    return form


def _default(unbiased: bool = True) -> tuple[Any, float, bool]:
    return None, int(unbiased), False


def _dim(dim: Any, unbiased: bool = True, keepdim: bool = False) -> tuple[Any, float, bool]:
    return dim, int(unbiased), keepdim


def correction(dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Any, float, bool]:
    return dim, 1 if correction is None else correction, keepdim


def batch_norm(
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
    """A group norm with one channel per group; with given statistics, a batch norm."""
    if not own:
        return b.emit(aten.batch_norm.default, x, weight, bias, mean, variance, False, momentum, eps, cudnn)
    return b.emit(aten.group_norm.default, x, shape_of(x)[1], weight, bias, eps, cudnn)


def _extreme(reduce: Any) -> Form:
    """`x.max()` and `x.min()` over all elements."""
    return lambda b, node, x: b.emit(reduce, x, list(range(len(shape_of(x)))), False)


TABLE = {
    aten.var.default: OpSpec(form=variance(_default, root=False, mean=False)),
    aten.var.dim: OpSpec(form=variance(_dim, root=False, mean=False)),
    aten.std.default: OpSpec(form=variance(_default, root=True, mean=False)),
    aten.std.dim: OpSpec(form=variance(_dim, root=True, mean=False)),
    aten.std.correction: OpSpec(form=variance(correction, root=True, mean=False)),
    aten.var_mean.default: OpSpec(form=variance(_default, root=False, mean=True)),
    aten.var_mean.dim: OpSpec(form=variance(_dim, root=False, mean=True)),
    aten.std_mean.default: OpSpec(form=variance(_default, root=True, mean=True)),
    aten.std_mean.dim: OpSpec(form=variance(_dim, root=True, mean=True)),
    aten.std_mean.correction: OpSpec(form=variance(correction, root=True, mean=True)),
    aten.max.default: OpSpec(form=_extreme(aten.amax.default)),
    aten.min.default: OpSpec(form=_extreme(aten.amin.default)),
    aten.instance_norm.default: OpSpec(form=_instance_norm),
}
