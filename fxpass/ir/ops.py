"""Local operators that a partitioned graph has beside ATen's. All are functional; only `exchange` communicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import Rows
from .operators import OpSpec, register, spec_of

LOCAL: set[Callable[..., Any]] = set()  #: every local operator
_PLAIN = OpSpec()


def local(spec: OpSpec = _PLAIN) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a local operator: one that a partitioned graph may call, with these facts."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        register({function: spec})
        LOCAL.add(function)
        return function

    return decorate


class Index:
    """Positions in any order, possibly repeated; compared by content."""

    def __init__(self, positions: np.ndarray) -> None:
        self.array = np.ascontiguousarray(positions, dtype=np.int64)
        self.array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        head = ", ".join(map(str, self.array[:4]))
        return f"[{head}{', …' if len(self) > 4 else ''}; {len(self)}]"


class Numbers:
    """Static numbers in float64; compared by content."""

    def __init__(self, values: Sequence[float] | np.ndarray) -> None:
        self.array = np.ascontiguousarray(values, dtype=np.float64)
        self.array.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Numbers) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.array.tobytes())


Table = Rows | Index | Numbers
Supply = Callable[[Table, torch.device], Tensor]


def index_tensor(index: Table, device: torch.device) -> Tensor:
    """The positions as an `int64` tensor on `device`, or the numbers in float64."""
    return _supply.get()(index, device)


@lru_cache(maxsize=1024)
def _made(index: Table, device: torch.device) -> Tensor:
    return torch.from_numpy(index.array.copy()).to(device)


_supply: ContextVar[Supply] = ContextVar("fxpass index tensors", default=_made)  # each thread has its own value


@contextmanager
def index_tensors_from(supply: Supply) -> Iterator[None]:
    """In this thread, let `supply` make the index tensors: a compiled graph takes them as inputs."""
    token = _supply.set(supply)
    try:
        yield
    finally:
        _supply.reset(token)


@local(OpSpec(free=True))
def take(x: Tensor, dim: int, rows: Rows) -> Tensor:
    """The local `rows` of `x` along `dim`, in ascending order; a view if they are one interval."""
    if len(rows) == x.shape[dim]:
        return x
    if not rows.runs:
        return x.narrow(dim, 0, 0)
    if rows.contiguous:
        return x.narrow(dim, rows.start, len(rows))
    return x.index_select(dim, index_tensor(rows, x.device))


def fill_rows(x: Tensor, dim: int, rows: Rows, values: Tensor) -> Tensor:
    """Write `values` into the local `rows` of `x` along `dim`, and return `x`."""
    if rows.contiguous:
        x.narrow(dim, rows.start, len(rows)).copy_(values)
    elif rows.runs:
        x.index_copy_(dim, index_tensor(rows, x.device), values)
    return x


@local()
def select(x: Tensor, dim: int, index: Index) -> Tensor:
    """`x.index_select(dim, index)` with a static index: for roll, flip, repeat, nearest up-sampling and reflection."""
    return x.index_select(dim, index_tensor(index, x.device))


@local()
def regroup(x: Tensor, first: int, stop: int, start: int, shape: Sequence[int]) -> Tensor:
    """Flatten dims first:stop of `x`, skip `start` elements, and reshape as many as `shape` holds."""
    flat = x.flatten(first, stop - 1)
    size = prod(shape) * flat.shape[first] // max(flat.numel(), 1)
    return flat.narrow(first, start, size).reshape(shape)


@local()
def resample(x: Tensor, dim: int, taps: Index, weights: tuple[tuple[float, ...], ...]) -> Tensor:
    """`y[o] = sum_t weights[t][o] * x[taps[t * len(o) + o]]` along `dim`: any static linear resampling."""
    out = len(weights[0])
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    shape = [out if d == dim else 1 for d in range(x.ndim)]
    result = None
    for t, row in enumerate(weights):
        index = index_tensor(Index(taps.array[t * out : (t + 1) * out]), x.device)
        factors = index_tensor(Numbers(row), x.device).to(wide).view(shape)
        term = x.index_select(dim, index).to(wide) * factors
        result = term if result is None else result + term
    assert result is not None
    return result.to(x.dtype)


@local()
def moments(x: Tensor, dims: Sequence[int]) -> Tensor:
    """`stack([mean, M2])` over `dims` (kept, size 1), in float32 at least; M2 is the sum of squared deviations."""
    wide = x if x.dtype == torch.float64 else x.float()
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    if count == 0:
        shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
        return wide.new_zeros((2, *shape))
    # two vectorised passes: `var_mean` updates its sums element by element, which takes five times as long on the CPU
    mean = wide.mean(list(dims), keepdim=True)
    deviation = torch.linalg.vector_norm(wide - mean, dim=list(dims), keepdim=True)
    return torch.stack([mean, deviation * deviation])


def dense(x: Tensor) -> Tensor:
    """`x` as another dtype can view it: copied unless its last dim lies densely in memory, and holds its values.

    Those of a tensor that is conjugated or negated lazily are others than those in its memory.
    """
    x = x.resolve_conj().resolve_neg()
    size = x.shape[-1] if x.ndim else 1
    steps = (*x.stride()[:-1], x.storage_offset())
    return x if x.is_contiguous() or (x.stride(-1) == 1 and all(n % size == 0 for n in steps)) else x.contiguous()


def _located(index: Tensor, rows: Rows, size: int) -> Tensor:
    """The places among `rows` of positions in a dim of `size` (negative: from the end); len(rows) for other rows."""
    place = torch.full((size,), len(rows), dtype=torch.int64, device=index.device)
    place[index_tensor(rows, index.device)] = torch.arange(len(rows), device=index.device)
    return place[index]


def _with_scratch_row(x: Tensor, dim: int) -> Tensor:
    return torch.constant_pad_nd(x, [0] * (2 * (x.ndim - 1 - dim)) + [0, 1])


@local()
def write_rows(
    operator: Any, rows: Rows, size: int, x: Tensor, dim: int, index: Tensor, *rest: Any, **kwargs: Any
) -> Tensor:
    """This rank's rows of `operator(whole, dim, index, *rest)`, which writes to the rows that `index` names.

    Args:
        operator: an ATen operator that writes along a dim, as `scatter` and `index_add` do.
        rows: this rank's rows of the dim, which has `size` rows in the whole value.
        x: these rows of the whole value. A scratch row absorbs writes to other rows.
    """
    y = operator(_with_scratch_row(x, dim), dim, _located(index, rows, size), *rest, **kwargs)
    return y.narrow(dim, 0, len(rows))


@local()
def put_rows(
    rows: Rows, size: int, dim: int, x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool
) -> Tensor:
    """`write_rows` for `index_put`: `indices[dim]` names the rows."""
    index = indices[dim]
    assert index is not None
    indices = [*indices[:dim], _located(index, rows, size), *indices[dim + 1 :]]
    y = torch.ops.aten.index_put.default(_with_scratch_row(x, dim), indices, values, accumulate)
    return y.narrow(dim, 0, len(rows))


def _flops(out: Sequence[int], operator: Any, dim: int, rows: Any, *args: Any) -> int:
    count = spec_of(operator).flops
    return count(out, *args) if count is not None else 0


@local(OpSpec(flops=_flops))
def rows_of(operator: Any, dim: int, rows: Rows, *args: Any) -> Tensor:
    """The local `rows` along `dim` of `operator(*args)`, whose other rows are incomplete on this rank."""
    return take(operator(*args), dim, rows)


@local()
def exponentials(x: Tensor, dims: Sequence[int]) -> Tensor:
    """`stack([max, sum of exp(x - max)])` over `dims` (kept, size 1); -inf and 0 if there are no elements."""
    if not all(x.shape[dim] for dim in dims):
        shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
        return torch.stack([x.new_full(shape, -torch.inf), x.new_zeros(shape)])
    most = x.amax(list(dims), keepdim=True)
    return torch.stack([most, torch.exp(x - torch.where(most.isinf(), 0, most)).sum(list(dims), keepdim=True)])


@local()
def group_moments(x: Tensor, groups: int) -> Tensor:
    """`moments` of each (sample, group) of `x` [B, C, …]: [2, B, groups]."""
    return moments(x.reshape(x.shape[0], groups, x[0].numel() // groups), [2]).squeeze(-1)


@local()
def group_normalize(
    x: Tensor, statistics: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm of `x` [B, C, …] with given `stack([mean, variance])` [2, B, groups]."""
    mean, variance = statistics[0], statistics[1]
    channels = x.shape[1]
    scale = torch.rsqrt(variance + eps)
    shift = -mean * scale
    scale, shift = (t.repeat_interleave(channels // groups, dim=1) for t in (scale, shift))
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    shape = (x.shape[0], channels, *(1,) * (x.ndim - 2))
    wide = x.to(scale.dtype)
    return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)


@local()
def causal_mask(rows: Rows, keys: int, like: Tensor) -> Tensor:
    """[len(rows), keys] boolean: query `rows[i]` sees keys 0 … rows[i]."""
    position = index_tensor(rows, like.device)
    return position[:, None] >= torch.arange(keys, device=like.device)[None, :]


@local()
def seen(mask: Tensor, key: Tensor, rows: Rows) -> Tensor:
    """The columns of `mask` for the keys that there are: all, or those of the window `rows`."""
    return mask if key.shape[-2] == mask.shape[-1] else take(mask, mask.ndim - 1, rows)


@local(OpSpec(free=True))
def exchange(values: tuple[Tensor, ...], exchanges: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Exchange several values in one message each way. The executor performs it; it is never called.

    In a scheduled graph this only launches the exchange, and `wait` returns the results.
    """
    raise RuntimeError("an exchange was called outside an executor")


@local(OpSpec(free=True))
def wait(launched: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of an exchange that was launched with `values`. The executor performs it; it is never called."""
    raise RuntimeError("an exchange was awaited outside an executor")
