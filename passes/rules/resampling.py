"""Interpolation and adaptive pooling: a static linear map along each dim. The split dim is resampled first, by itself.

The operator is applied to an identity matrix, which gives the weight of each input row in each output row. So one rule
covers nearest, linear, cubic, antialiased and area resampling.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir import ops
from ...ir.layout import Layout, Rows, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..partition import Op, Partitioner, SplitError
from .slicing import remap

aten = torch.ops.aten


@lru_cache(maxsize=256)
def response(target: Any, size: int, i: int, spatial: int, args: tuple[Any, ...], dtype: torch.dtype) -> np.ndarray:
    """[outputs, size]: the weights of the operator along spatial dim `i`, in float64.

    The other dims have size 2: torch's antialiased kernels are wrong on a single column. `dtype` is that in which torch
    computes positions: over a thousand rows, float32 is off by more than the rounding of values.
    """
    shape = [1, size] + [size if j == i else 1 for j in range(spatial)]
    x = torch.eye(size, dtype=dtype).view(shape)
    y = target(x.expand([1, size] + [size if j == i else 2 for j in range(spatial)]).contiguous(), *args)
    for j in reversed(range(spatial)):
        y = y if j == i else y.select(2 + j, 0)
    return y[0].T.double().numpy()


def _only(values: Any, i: int, other: Any) -> Any:
    return None if values is None else [v if j == i else other for j, v in enumerate(values)]


def resample(p: Partitioner, op: Op, x: fx.Node, output_size: list[int], *rest: Any) -> fx.Node:
    """`rest` is (align_corners, scales…) for smooth modes, (scales…) for nearest, and empty for adaptive pooling."""
    layout = layout_of(x)
    spatial = len(output_size)
    i = layout.axis - (len(op.shape) - spatial)
    if i < 0:
        return p.same(op, (x, output_size, *rest), layout=layout)
    if op.target in ANTIALIASED and op.shape[-1] == 1:  # the result of the unsplit model is wrong, too
        raise SplitError(COLUMN)
    flags, scales = rest[: len(rest) - spatial], rest[len(rest) - spatial :] if len(rest) >= spatial else ()
    one = (_only(output_size, i, 2), *flags, *(s if j == i else None for j, s in enumerate(scales)))
    dim, size, outputs = layout.axis, shape_of(x)[layout.axis], op.shape[layout.axis]
    if outputs < p.world:
        x = p.whole(x, "small", f"fewer rows than ranks along dim {dim}")
        return p.same(op, (x, output_size, *rest), layout=Layout())
    wide = torch.float64 if op.dtype == torch.float64 else torch.float32  # so do torch's half-precision kernels
    weights = response(op.target, size, i, spatial, _hashable(one), wide)
    shape = (*shape_of(x)[:dim], outputs, *shape_of(x)[dim + 1 :])
    if (np.count_nonzero(weights, axis=1) == 1).all() and (weights.sum(axis=1) == 1).all():
        x = remap(p, x, dim, weights.argmax(axis=1))
    else:
        x = _weighted(p, x, dim, weights, shape, op.dtype)
    if all(
        j == i or (op.shape[j - spatial] == shape[j - spatial] and (not scales or scales[j] in (None, 1.0)))
        for j in range(spatial)
    ):
        return x
    if op.target in ANTIALIASED and dim == len(shape) - 1 and 1 in layout_of(x).sizes:
        raise SplitError(COLUMN)
    sizes = p.local(op.shape, layout_of(x))[-spatial:]
    other_scales = tuple(None if j == i else s for j, s in enumerate(scales))
    return p.same(op, (x, sizes, *flags, *other_scales), layout=layout_of(x))


def _hashable(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(a) if isinstance(a, list) else a for a in args)


def _weighted(
    p: Partitioner, x: fx.Node, dim: int, weights: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype
) -> fx.Node:
    layout = layout_of(x)
    outputs, size = weights.shape
    first, last = (weights != 0).argmax(axis=1), size - 1 - (weights != 0)[:, ::-1].argmax(axis=1)
    centres = (first + last) // 2
    rows = p.spread(tuple(Rows.of(np.flatnonzero(np.isin(centres, r.array))) for r in layout.rows), outputs)
    assert rows is not None, "fewer rows than ranks"
    width = int((last - first).max()) + 1
    first = np.minimum(first, size - width)
    taps = first[:, None] + np.arange(width)
    want = tuple(Rows.of(taps[r.array].reshape(-1)) for r in rows)
    x = p.fetch(x, dim, want, "halo", may_be_stale=True)
    indices, values = [], []
    for mine, have in zip(rows, p.rows(x, dim), strict=True):
        positions = taps[mine.array]
        indices.append(ops.Index(np.searchsorted(have.array, positions.T.reshape(-1))))
        values.append(tuple(map(tuple, np.take_along_axis(weights[mine.array], positions, 1).T.tolist())))
    return p.emit(
        ops.resample, (x, dim, per_rank(indices), per_rank(values)), shape=shape, dtype=dtype, layout=Layout(dim, rows)
    )


COLUMN = "torch's antialiased kernels are wrong on a single column"
ANTIALIASED = (aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default)
_NAMES = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d
"""

TABLE = {getattr(aten, name).default: OpSpec(resample) for name in _NAMES.split()}
