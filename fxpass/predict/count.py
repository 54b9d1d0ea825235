"""Count what an operator written in Python does, by running it on tensors without data.

This is for the compiler's own operators (`fxpass.ir.ops`, `fxpass.ir.comm`), which are several kernels each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir import comm
from ..ir.exchange import Exchange, Payloads
from ..ir.fetch import Fetch
from ..ir.ops import Numbers, Table, index_tensors_from
from ..ir.transfer import Transfer

META = torch.device("meta")
aten = torch.ops.aten
#: operators that read as much of an operand as they write, not all of it
READS_PART = {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor}


@dataclass(frozen=True)
class Counted:
    """What an operator does on one rank."""

    kernels: float  #: views and allocations are none
    moved: float  #: bytes read and written
    allocated: float  #: bytes of its results that are no views of its operands
    most: float  #: bytes that it has allocated at once, its results among them


def count(target: Callable[..., Any], args: Any, kwargs: Any) -> Counted:
    """Run an operator on tensors without data.

    Args:
        args: with an object that has `shape` and `dtype` in place of each tensor.
    """

    def made(each: Any) -> Any:
        return torch.empty(each.shape, dtype=each.dtype, device=META) if hasattr(each, "dtype") else each

    args, kwargs = fx.node.map_aggregate((args, kwargs), made)
    return _run(target, *args, **kwargs)


def _run(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Counted:
    given = {_storage(each) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
    counting = _Counting()
    with torch.no_grad(), index_tensors_from(counting.table), counting:
        result = target(*args, **kwargs)
    new = {_storage(each): _bytes(each) for each in pytree.tree_leaves(result) if isinstance(each, Tensor)}
    made = sum(size for key, size in new.items() if key not in given)
    return Counted(counting.kernels, counting.moved, made, max(made, counting.most))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """The memory that a tensor covers: of one that is expanded, what is there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.moved = 0
        self.alive = 0  #: bytes allocated here and not freed yet
        self.most = 0
        self.paused = False

    def table(self, index: Table, device: torch.device) -> Tensor:
        """A table of positions or numbers, which a runner makes once and keeps."""
        self.paused = True
        dtype = torch.float64 if isinstance(index, Numbers) else torch.int64
        made = torch.empty(index.array.shape, dtype=dtype, device=device)
        self.paused = False
        return made

    def _allocated(self, result: Any) -> None:
        for each in pytree.tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.alive)

    def _freed(self, size: int) -> None:
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name.rpartition("::")[2]
        if not view and not any(r.alias_info is not None for r in returns):
            self._allocated(result)
        if view or "empty" in name:
            return result
        read = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        written = [each for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
        size = sum(map(_bytes, written))
        self.kernels += 1
        self.moved += size + (size if func in READS_PART else sum(map(_bytes, read)))
        return result


# -- operators of an exchange --------------------------------------------------------------------------------------


def count_communication(target: Callable[..., Any], exchange: Exchange, rank: int) -> Counted:
    """What an operator of `fxpass.ir.comm` does on one rank."""
    if isinstance(exchange, Transfer) and exchange.sends(rank) == (target is comm.assemble):
        return Counted(0, 0, 0, 0)  # who sends gets nothing
    return _run(target, *(_ARGUMENTS[target](exchange, rank)))


def _tensor(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=META)


def _own(each: Exchange, rank: int) -> Tensor:
    shape = each.shape
    if isinstance(each, Transfer):
        shape = each.payload_shape(rank, rank)
    if isinstance(each, Fetch):
        shape = (*shape[: each.dim], len(each.have[rank]), *shape[each.dim + 1 :])
    return _tensor(shape, each.dtype)


def _received(each: Exchange, rank: int) -> Tensor:
    return _tensor(comm.received_shape(each, rank), each.dtype)


def _known(each: Exchange, rank: int) -> Tensor:
    return comm.sent_rows(_own(each, rank), each, rank)  # type: ignore[arg-type]


def _witnesses(each: Exchange, rank: int) -> tuple[Tensor, ...]:
    return tuple(comm.witness(_own(each, rank), each) for _ in range(3))


def payloads(each: Exchange, rank: int) -> Payloads:
    """What a rank receives, without data."""
    return [
        _tensor(each.payload_shape(src, rank), each.dtype) if src != rank and each.numel(src, rank) else None
        for src in range(each.world)
    ]


def sent(each: Exchange, rank: int) -> Payloads:
    """What a rank sends, without data; a payload that all others get is there once."""
    found = each.pack(rank, _own(each, rank))
    return list({id(part): part for part in found if part is not None}.values())


def write(packed: Payloads) -> list[Tensor]:
    """Copy payloads into a message, as a put does."""
    return [torch.empty_like(part).copy_(part) for part in packed if part is not None]


#: the arguments of each operator, from the exchange and the rank
_ARGUMENTS: dict[Callable[..., Any], Callable[[Any, int], tuple[Any, ...]]] = {
    comm.pack: lambda e, r: (_own(e, r), e, r),
    comm.unpack: lambda e, r: (_own(e, r), _received(e, r), e, r),
    comm.estimate: lambda e, r: (
        _own(e, r), _received(e, r), _own(e, r), _received(e, r), _tensor((), torch.float64), e, r
    ),
    comm.local: lambda e, r: (_own(e, r), e, r),
    comm.witness: lambda e, r: (_own(e, r), e),
    comm.forecast: lambda e, r: (_received(e, r), _received(e, r), *_witnesses(e, r), e),
    comm.sent_rows: lambda e, r: (_own(e, r), e, r),
    comm.encode_change: lambda e, r: (_own(e, r), _known(e, r), e, r),
    comm.decode_change: lambda e, r: (_received(e.wire, r), _received(e.steady, r), e),
    comm.windowed: lambda e, r: (_received(e, r), e, r),
    comm.assemble: lambda e, r: (e, r, payloads(e, r), META),
    write: lambda e, r: (sent(e, r),),
}  # fmt: skip
