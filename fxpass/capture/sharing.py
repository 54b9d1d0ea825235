"""Results that share memory: a write to one is seen in the others, also where a model is split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ir.program import SharedResult

ALIGNED = 16  #: bytes: the places in a piece of memory are counted from a multiple of the size of any dtype
_MOST = 1 << 26  #: units of memory that are marked to see whether two results have one of them in common


def shared_among(results: Sequence[Tensor]) -> tuple[tuple[SharedResult, ...], ...]:
    """The results that share memory with others: for each piece of memory the places of its results.

    Args:
        results: fake ones, in order.
    """
    pieces: list[list[tuple[int, Tensor]]] = []
    for i, each in enumerate(results):
        if _has_memory(each):
            joined = [piece for piece in pieces if any(_overlap(each, other) for _, other in piece)]
            pieces = [piece for piece in pieces if piece not in joined]
            pieces.append([*(entry for piece in joined for entry in piece), (i, each)])
    return tuple(tuple(_places(piece)) for piece in pieces if len(piece) > 1)


def _places(piece: Sequence[tuple[int, Tensor]]) -> Iterator[SharedResult]:
    first = min(_start(each) for _, each in piece) // ALIGNED * ALIGNED
    for i, each in sorted(piece, key=lambda entry: entry[0]):
        at = _start(each) - first
        yield SharedResult(
            i, each.dtype, each.shape, each.stride(), at, at + _length(each), each.is_conj(), each.is_neg()
        )


def sharing(pieces: Sequence[Sequence[SharedResult]], results: Sequence[Tensor]) -> list[Tensor]:
    """The results, of which some share memory as they do in the model."""
    new = list(results)
    for piece in pieces:
        # some have no memory yet; others are selected rows, of which there are others in this call
        here = [p for p in piece if type(new[p.index]) is Tensor and new[p.index].shape == p.shape]
        if len(here) < 2:
            continue
        start, end = min(p.start for p in here), max(p.end for p in here)
        whole = next((p for p in here if (p.start, p.end) == (start, end) and _is_plain(p)), None)
        memory = None if whole is None else _memory(whole, new[whole.index], here)
        if memory is None:
            size = -(-end // ALIGNED) * ALIGNED
            memory, start = torch.empty(size, dtype=torch.uint8, device=new[here[0].index].device), 0
            for place in here:
                target = _view(memory, place, start)
                # elements that lie in one place are copied once
                once = [0 if step == 0 else slice(None) for step in place.stride]
                target[tuple(once)].copy_(new[place.index][tuple(once)])
        for place in here:
            new[place.index] = _view(memory, place, start)
    return new


def _memory(whole: SharedResult, base: Tensor, places: Sequence[SharedResult]) -> Tensor | None:
    """The bytes of a result in which all places lie; None if some cannot be read there as another dtype."""
    if base.stride() != whole.stride or base.is_conj() or base.is_neg():
        base = torch.empty_strided(base.shape, whole.stride, dtype=base.dtype, device=base.device).copy_(base)
    memory = base.as_strided((base.numel(),), (1,)).view(torch.uint8)
    begins = memory.storage_offset() - whole.start
    return None if any((begins + place.start) % place.dtype.itemsize for place in places) else memory


def _view(memory: Tensor, place: SharedResult, start: int) -> Tensor:
    """The result that lies at a place of memory whose first byte counts as `start`."""
    view = memory[place.start - start : place.end - start].view(place.dtype).as_strided(place.shape, place.stride)
    view = torch._conj(view) if place.conj else view
    return torch._neg_view(view) if place.neg else view


def _has_memory(tensor: Tensor) -> bool:
    return not is_traceable_wrapper_subclass(tensor) and tensor.layout == torch.strided and tensor.numel() > 0


def _start(tensor: Tensor) -> int:
    """Where a tensor begins in its storage, in bytes."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _length(tensor: Tensor) -> int:
    """How many bytes of memory a tensor reaches over."""
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.element_size()


def _is_plain(place: SharedResult) -> bool:
    """Whether the elements of a result are all of the memory that it reaches over, each once, as they are."""
    dims = sorted((step, n) for n, step in zip(place.shape, place.stride, strict=True) if n > 1)
    sizes = [n for _, n in dims]
    return not place.conj and not place.neg and all(step == prod(sizes[:i]) for i, (step, _) in enumerate(dims))


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two results have a byte of memory in common."""
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    first, end = (choose(_start(one), _start(other)) for choose in (min, max))
    if end >= min(_start(each) + _length(each) for each in (one, other)):
        return False
    tables = [_table(each) for each in (one, other)]
    unit = gcd(end - first, *(number for run, dims in tables for number in (run, *(step for _, step in dims))))
    count = (max(_start(each) + _length(each) for each in (one, other)) - first) // unit
    if count > _MOST:
        return True
    marks = np.zeros(count, dtype=bool)
    views: list[np.ndarray] = []
    for each, (run, dims) in zip((one, other), tables, strict=True):
        sizes, steps = zip((run // unit, 1), *((n, step // unit) for n, step in dims), strict=True)
        views.append(np.lib.stride_tricks.as_strided(marks[(_start(each) - first) // unit :], sizes, steps))
    views[0][...] = True
    return bool(views[1].any())


def _table(tensor: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """The bytes of a tensor: how many lie beside each other, and how often and at which distance these repeat."""
    run, dims = tensor.element_size(), list[tuple[int, int]]()
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        step = stride * tensor.element_size()
        if n > 1 and step == run and not dims:
            run *= n
        elif n > 1 and step:
            dims.append((n, step))
    return run, dims
