"""Copies between strided tensors as tables of contiguous pieces, which one kernel copies (`symmetric_kernels.copy`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

UNIT = 16  #: bytes: pieces begin at multiples of it, and have multiples of it as size
MOST = 1 << 14  #: bytes of a piece
LEAST = 128  #: bytes of a piece on average: smaller ones are better copied by torch's own kernel


def pieces(source: Tensor, target: Tensor) -> np.ndarray | None:
    """How to copy a tensor to another of the same shape and dtype, piece by piece.

    Returns:
        int64 [pieces, 3], in bytes: where a piece begins in the storage of `source`, where in that of `target`, and its
        size; None where the pieces would be too small or do not begin at multiples of `UNIT`, or where a tensor is
        conjugated or negated lazily, so that its bytes are not its values.
    """
    if any(x.is_conj() or x.is_neg() for x in (source, target)):
        return None
    size = source.element_size()
    dims = _merged([each for each in zip(source.shape, source.stride(), target.stride(), strict=True) if each[0] > 1])
    run = 1
    if dims and dims[-1][1] == dims[-1][2] == 1:
        run = dims.pop()[0]
    length = run * size
    if length % UNIT or length < LEAST:
        return None
    starts = np.array([[source.storage_offset() * size, target.storage_offset() * size]], dtype=np.int64)
    for count, here, there in dims:
        steps = np.arange(count, dtype=np.int64)[:, None] * np.array([here * size, there * size], dtype=np.int64)
        starts = (starts[:, None] + steps[None]).reshape(-1, 2)
    if (starts % UNIT).any():
        return None
    cuts = np.arange(0, length, MOST, dtype=np.int64)
    starts = (starts[:, None] + cuts[None, :, None]).reshape(-1, 2)
    sizes = np.tile(np.minimum(MOST, length - cuts), len(starts) // len(cuts))
    return np.concatenate([starts, sizes[:, None]], 1)


def _merged(dims: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The fewest dims that visit the same elements, each (size, stride of the source, stride of the target)."""
    merged: list[tuple[int, int, int]] = []
    for count, here, there in sorted(dims, key=lambda each: each[2], reverse=True):
        if merged and merged[-1][1:] == (here * count, there * count):
            merged[-1] = merged[-1][0] * count, here, there
        else:
            merged.append((count, here, there))
    return merged
