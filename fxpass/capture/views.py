"""Results that lie in the memory of another one: a write to one is seen in the other, also where a model is split."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ir.program import View


def views_among(results: Sequence[Tensor]) -> tuple[View, ...]:
    """The results all of whose memory belongs to a larger one that is dense.

    Args:
        results: fake ones, in order.
    """
    found: list[View] = []
    bases: list[tuple[int, Tensor]] = []
    plain = [(i, each) for i, each in enumerate(results) if _is_plain(each)]
    for i, view in sorted(plain, key=lambda each: (not _is_dense(each[1]), -each[1].numel())):
        for j, base in bases:
            offset = int(view.storage_offset() - base.storage_offset())
            inside = 0 <= offset <= base.numel() - _span(view)
            if inside and _storage(view) == _storage(base) and view.dtype == base.dtype:
                found.append(View(i, j, view.shape, view.stride(), offset, base.shape, base.stride()))
                break
        else:
            if _is_dense(view):
                bases.append((i, view))
    return tuple(found)


def as_views(views: Sequence[View], results: Sequence[Tensor]) -> list[Tensor]:
    """The results, of which some lie in the memory of others as they do in the model."""
    new = list(results)
    for view in views:
        base = new[view.base]
        if type(base) is not Tensor or type(new[view.result]) is not Tensor:
            continue  # values that have no memory yet
        if new[view.result].shape != view.shape or base.shape != view.base_shape:
            continue  # selected rows, of which there are others in this call
        if base.stride() != view.base_stride or base.is_conj() or base.is_neg():
            base = torch.empty_strided(base.shape, view.base_stride, dtype=base.dtype, device=base.device).copy_(base)
            new[view.base] = base
        new[view.result] = base.as_strided(view.shape, view.stride, base.storage_offset() + view.offset)
    return new


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's elements are those in its memory."""
    strided = not is_traceable_wrapper_subclass(tensor) and tensor.layout == torch.strided
    return strided and tensor.numel() > 0 and not tensor.is_conj() and not tensor.is_neg()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(tensor: Tensor) -> int:
    """How many elements of memory a tensor reaches over."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements are all of its memory, each once."""
    dims = sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    sizes = [n for _, n in dims]
    return all(stride == prod(sizes[:i]) for i, (stride, _) in enumerate(dims))
