"""The price of an operator of a step program on every rank: kernels, seconds on the device, bytes that it allocates.

    seconds = kernels * Device.kernel + max(FLOPs at the rate that the shape allows, bytes at the rate of the memory,
                                            elements at the rate of the operator, if the device has one)

All ranks run the same operators in the same order, so one program serves for all: figures are arrays over the ranks, of
one element where the ranks are alike. Equal operators are priced once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, inf, prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ..ir import comm
from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.operators import spec_of
from ..ir.program import layout_of
from ..passes.cost import alike
from ..passes.targets import Device, Work
from .count import READS_PART, Counted, count, count_communication

aten = torch.ops.aten
Shape = tuple[int, ...]
Figures = np.ndarray  #: of each rank, or one element for all: float64
BATCHED = {aten.bmm.default, aten.matmul.default, aten.baddbmm.default}  #: all dims but the last two are a batch


@dataclass(frozen=True, eq=False)
class Price:
    """The figures of one operator on the ranks."""

    kernels: Figures  #: the largest of all ranks; 0 on ranks that do not run it
    seconds: Figures  #: on the device
    allocated: Figures  #: bytes of the result; 0 for a view
    most: Figures  #: bytes allocated at once, the result among them


NONE = Counted(0, 0, 0, 0)
NOTHING = Price(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1))


@dataclass(frozen=True)
class _Operand:
    """What the price of an operator depends on of an operand: its part on a rank."""

    shape: Shape
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize if self.dtype is not None else 0


class Prices:
    """The prices of operators on one device.

    Args:
        world: the number of ranks.
    """

    def __init__(self, device: Device, world: int) -> None:
        self.device = device
        self.world = world
        self._known: dict[Any, Price] = {}
        self._local: dict[Any, tuple[float, ...]] = {}

    def of(self, node: fx.Node) -> Price:
        """The price of a node of a step program that neither puts nor gets."""
        if node.op != "call_function" or node.target is operator.getitem or spec_of(node.target).free:
            return NOTHING
        declared = next((each for each in node.args if isinstance(each, Exchange)), None)
        if declared is not None:
            return self.communication(node.target, declared)  # type: ignore[arg-type]
        if "dtype" not in node.meta:
            return NOTHING
        key = (node.target, fx.node.map_arg((node.args, node.kwargs), _described), _described(node))
        if key not in self._known:
            self._known[key] = self._operator(node)
        if "placed" not in node.meta:
            return self._known[key]
        placed = (key, node.meta["placed"])
        if placed not in self._known:
            own = np.zeros(self.world)
            own[list(node.meta["placed"])] = 1
            every = self._known[key]
            self._known[placed] = Price(
                *(own * each for each in (every.kernels, every.seconds, every.allocated, every.most))
            )
        return self._known[placed]

    def communication(self, target: Callable[..., Any], declared: Exchange) -> Price:
        """The price of an operator of `fxpass.ir.comm` on an exchange."""
        key = (target, declared)
        if key not in self._known:
            found: dict[Any, Counted] = {}
            counted: list[Counted] = []
            for rank in range(self.world):
                place = declared.place(rank)
                kind = _kind_of_rank(declared, place) if declared.has(rank) else None
                if kind not in found:
                    found[kind] = NONE if kind is None else count_communication(target, declared, place)
                counted.append(found[kind])
            most = max(each.kernels for each in counted)
            self._known[key] = Price(
                np.array([most if each is not NONE else 0.0 for each in counted]),
                np.array([self._memory_bound(each) for each in counted]),
                np.array([float(each.allocated) for each in counted]),
                np.array([float(each.most) for each in counted]),
            )
        return self._known[key]

    def _memory_bound(self, counted: Counted) -> float:
        return counted.kernels * self.device.kernel + counted.moved / self._bandwidth(counted)

    def _bandwidth(self, counted: Counted) -> float:
        """Bytes per second of kernels that find their operands in the cache if these are small enough."""
        cached = counted.moved <= self.device.cache * counted.kernels
        return self.device.cache_bandwidth if cached and self.device.cache_bandwidth else self.device.bandwidth

    def _operator(self, node: fx.Node) -> Price:
        first = alike((node, *node.all_input_nodes), self.world)
        if any(_fetched(each) for each in node.all_input_nodes):  # windows differ from rank to rank
            first = tuple(range(self.world))
        found = {rank: self._on(node, rank) for rank in sorted(set(first))}
        figures = [found[rank] for rank in first] if len(found) > 1 else list(found.values())
        kernels, *others = (np.array(each, dtype=float) for each in zip(*figures, strict=True))
        return Price(np.full(1, kernels.max()), *others)

    def _on(self, node: fx.Node, rank: int) -> tuple[float, ...]:
        """The figures of a `Price` on one rank."""

        def local(each: fx.Node) -> _Operand:
            return _part(each, rank)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), local)
        result = local(node)
        key = (node.target, args, kwargs, result)
        if key not in self._local:
            self._local[key] = self._priced(node, args, kwargs, result)
        return self._local[key]

    def _priced(self, node: fx.Node, args: Any, kwargs: Any, result: _Operand) -> tuple[float, ...]:
        operands = _operands((args, kwargs))
        counted = _counted(node, operands, result)
        flops = node.meta.get("flops") or 0
        if (formula := spec_of(node.target).flops) is not None:
            shapes = fx.node.map_aggregate(args, lambda each: each.shape if isinstance(each, _Operand) else each)
            flops = formula(result.shape, *shapes)
        if not flops:
            seconds = counted.kernels * self.device.kernel + self._elements(node, result)
            return counted.kernels, max(seconds, self._memory_bound(counted)), counted.allocated, counted.most
        dtype = next((each.dtype for each in operands if each.dtype is not None), result.dtype)
        kind, *matrix = _result_of(node, result.shape)
        slower = slowdown(self.device.units, self.device.tiles, *matrix)
        computing = flops / self.device.rate(str(dtype).removeprefix("torch."), kind) * slower
        seconds = counted.kernels * self.device.kernel + max(computing, counted.moved / self.device.bandwidth)
        return counted.kernels, seconds, counted.allocated, counted.most

    def _elements(self, node: fx.Node, result: _Operand) -> float:
        """Seconds of the elements of a result, where the device has a rate of the operator."""
        target = node.target
        name = target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""
        return prod(result.shape) / self.device.elements[name] if name in self.device.elements else 0.0


def _counted(node: fx.Node, operands: list[_Operand], result: _Operand) -> Counted:
    """What an operator does with these operands: one of ATen's in one kernel, one of ours as it is written."""
    size = sum(each.bytes for each in operands)
    if isinstance(node.target, torch._ops.OpOverload):
        read = result.bytes if node.target in READS_PART else size
        return Counted(1, read + result.bytes, result.bytes, result.bytes)
    # the static arguments are those of the rank that the program is of: its count is scaled
    own = fx.node.map_arg((node.args, node.kwargs), _own)
    seen = count(node.target, *own)  # type: ignore[arg-type]
    share = (size + result.bytes) / max(1, sum(each.bytes for each in _operands(own)) + _own(node).bytes)
    return Counted(seen.kernels, seen.moved * share, result.bytes, seen.most * share)


@lru_cache(maxsize=1 << 14)
def _kind_of_rank(declared: Exchange, rank: int) -> Any:
    """Ranks with an equal value do the same work in an exchange, which counts them."""
    ranks = range(declared.world)
    received = tuple(declared.numel(src, rank) for src in ranks if src != rank)
    sent = tuple(declared.numel(rank, dst) for dst in ranks if dst != rank)
    if not isinstance(declared, Fetch):
        return received, sent
    own = len(declared.have[rank]), len(declared.want[rank])
    return own, declared.framed(rank), tuple(filter(None, received)), tuple(filter(None, sent))


def _fetched(node: fx.Node) -> Fetch | None:
    """The exchange that fetches a window: such a value has another shape than in exact steps."""
    if node.target is not comm.unpack or "shape" in node.meta:
        return None
    return node.args[2]  # type: ignore[return-value]


def _described(node: fx.Node) -> Any:
    return _fetched(node) or (node.meta.get("shape"), layout_of(node), node.meta.get("dtype"))


def _part(node: fx.Node, rank: int) -> _Operand:
    """A value on one rank."""
    if window := _fetched(node):
        want = window.want[window.place(rank)]
        rows = (*window.shape[: window.dim], len(want), *window.shape[window.dim + 1 :])
        return _Operand(rows, window.dtype)
    return _Operand(layout_of(node).local_shape(node.meta.get("shape", ()), rank), node.meta.get("dtype"))


def _own(node: fx.Node) -> _Operand:
    """A value on the rank that the program is of."""
    if "local_shape" in node.meta:
        return _Operand(tuple(node.meta["local_shape"]), node.meta.get("dtype"))
    return _part(node, 0)


def _operands(tree: Any) -> list[_Operand]:
    found: list[_Operand] = []
    fx.node.map_aggregate(tree, lambda each: found.append(each) if isinstance(each, _Operand) else None)
    return found


def _result_of(node: fx.Node, shape: Shape) -> tuple[Work, int, int, int]:
    """The kind of work, and the rows, the columns and the batch of the result as a matrix."""
    target = node.args[0] if node.args and callable(node.args[0]) else node.target  # `ops.rows_of` names its operator
    name = str(target)
    if "conv" in name:
        return "convolution", prod(shape) // max(shape[1], 1), shape[1], 1
    if "attention" in name:
        return "attention", shape[-2], 0, prod(shape[:-2])
    if target in BATCHED:
        return "product", shape[-2], shape[-1], prod(shape[:-2])
    return "product", prod(shape[:-1]), shape[-1] if shape else 1, 1


@cache
def slowdown(units: int, tiles: tuple[tuple[int, int, float], ...], rows: int, columns: int, batch: int) -> float:
    """How much longer a result of this shape takes than its FLOPs at the full rate.

    The result is computed in tiles, one per multiprocessor at a time: the last wave of tiles, and tiles that reach over
    the edge, leave some of them idle. The best size of tiles counts. Attention tiles its queries only.

    Args:
        units, tiles: of the `Device`.
        columns: 0 for attention.
    """
    best = inf
    for high, wide, speed in tiles:
        across = ceil(columns / wide) if columns else 1
        waves = ceil(batch * ceil(rows / high) * across / units)
        useful = batch * rows * (columns / wide if columns else 1) / high
        best = min(best, waves * units / max(useful, 1e-9) / speed)
    return best
