"""Statistics: variances, extremes, and norms by given or own statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import shape_of
from ..builder import Builder, Form, unpacked

aten = torch.ops.aten


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


def _extreme(reduce: Any) -> Form:
    """`x.max()` and `x.min()` over everything."""
    return lambda b, node, x: b.emit(reduce, x, list(range(len(shape_of(x)))), False)


TABLE: dict[Any, Form] = {
    **{
        getattr(getattr(aten, name), overload): _variance("std" in name, "mean" in name)
        for name in ("var", "std", "var_mean", "std_mean")
        for overload in ("default", "dim", "correction")
    },
    aten.max.default: _extreme(aten.amax.default),
    aten.min.default: _extreme(aten.amin.default),
    aten.native_batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
}
