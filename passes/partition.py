"""partition: turn a graph on whole tensors into one graph of local operators and declared exchanges. Exact.

One walk over the graph, in order. An operator with a split operand goes to its rule (`passes/rules/`), which emits
local operators and the exchanges they need, and decides the layout of the result. An operator whose operands are all
whole runs unchanged on every rank. Without a rule, torch's decomposition of the operator is split instead; without
that, its operands are gathered (role `fallback`, with the reason).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..ir import ops
from ..ir.exchange import Exchange, Role
from ..ir.fetch import Fetch
from ..ir.layout import WHOLE, Layout, Rows, even, full, owned, per_rank
from ..ir.merge import Moments, Reduce, ReduceOp
from ..ir.nodes import append, call_key
from ..ir.program import layout_of, shape_of
from .decompose import decompose


class SplitError(Exception):
    """A rule has no exact local form for these operands; the message is the reason."""


@dataclass(frozen=True)
class Op:
    """The operator being partitioned, with the shape and dtype of its result on whole tensors."""

    node: fx.Node
    target: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.node)

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["dtype"]


Rule = Callable[..., "fx.Node | tuple[fx.Node, ...]"]


class Partitioner:
    """The interface for rules.

    Values are nodes of the new graph; `layout_of` and `shape_of` give their layout and whole shape.
    """

    def __init__(self, graph: fx.Graph, world: int, cuts: Mapping[str, Layout], rules: Mapping[Any, Rule]) -> None:
        self.world = world
        self._source = graph
        self._cuts = cuts
        self._rules = rules
        self._graph = fx.Graph()
        self._memo: dict[Any, fx.Node] = {}
        self._node: fx.Node | None = None

    def run(self) -> fx.Graph:
        env: dict[fx.Node, Any] = {}
        for node in self._source.nodes:
            self._node = node
            if node.op == "placeholder":
                new = self._graph.placeholder(node.name)
                new.meta = dict(node.meta) | {"layout": node.meta.get("given", WHOLE)}
                env[node] = self._with_cut(node, new)
            elif node.op == "output":
                kept = node.meta.get("kept", ())
                results = [env[each] for each in node.args[0]]
                self._graph.output(tuple(self._output(each, i in kept) for i, each in enumerate(results)))
            elif node.target is operator.getitem:
                env[node] = self._with_cut(node, env[node.args[0]][node.args[1]])
            else:
                env[node] = self._with_cut(node, self._operator(node, env))
        for node in reversed(self._graph.nodes):
            if node.op == "call_function" and not node.users:
                self._graph.erase_node(node)  # safe: every operator is functional
        return self._graph

    # -- for rules -------------------------------------------------------------------------------------------

    def emit(
        self,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        layout: Layout = WHOLE,
        holes: bool = False,
    ) -> fx.Node:
        """Emit a local operator, or return the equal one that was emitted before.

        A layout with all rows on every rank becomes WHOLE, so that broadcasting works. Where the ranks computed those
        rows from parts, their copies may differ in the last bit, and each row is taken from one rank.

        Args:
            holes: `layout` may leave rows out, because no operator reads them.
        """
        everywhere = layout.dim is not None and min(layout.sizes) == shape[layout.dim]
        copies = everywhere and self.world > 1 and any(map(_is_split, _nodes((args, kwargs))))
        described = {"shape": tuple(shape), "dtype": dtype, "layout": WHOLE if everywhere and not copies else layout}
        node = self._emit(target, args, kwargs or {}, described)
        if holes and layout.dim is not None and not layout.covers(shape[layout.dim]):
            node.meta["holes"] = True
        if not copies:
            return node
        reason = "every rank computes all rows, and the copies may differ in the last bit"
        held = layout.rows
        declared = Fetch(
            "small", shape_of(node), dtype, self.world, reason, layout.axis, held, held, owners=owned(held)
        )
        return self._exchange(node, declared, shape, WHOLE)

    def same(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, layout: Layout) -> fx.Node:
        """Emit the operator itself on local parts; its result has `layout`."""
        return self.emit(op.target, args, kwargs, shape=op.shape, dtype=op.dtype, layout=layout)

    def several(
        self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any] | None, layouts: Sequence[Layout]
    ) -> tuple[fx.Node, ...]:
        """As `same`, for an operator with several results."""
        whole = self._emit(op.target, args, kwargs or {}, {})
        return tuple(
            self.emit(operator.getitem, (whole, i), shape=value.shape, dtype=value.dtype, layout=layout)
            for i, (value, layout) in enumerate(zip(op.node.meta["val"], layouts, strict=True))
        )

    def take(self, x: fx.Node, dim: int, rows: tuple[Rows, ...], *, holes: bool = False) -> fx.Node:
        """Select rows that each rank already holds (law 2, `take`); needs no exchange."""
        have = self.rows(x, dim)
        local = per_rank([h.locate(w) for h, w in zip(have, rows, strict=True)])
        if rows == have:
            return x
        shape, layout = shape_of(x), Layout(dim, rows)
        return self.emit(ops.take, (x, dim, local), shape=shape, dtype=x.meta["dtype"], layout=layout, holes=holes)

    def rows(self, x: fx.Node, dim: int) -> tuple[Rows, ...]:
        """The rows of `x` along `dim` that each rank holds."""
        layout = layout_of(x)
        return layout.rows if layout.dim == dim else full(shape_of(x)[dim], self.world)

    def fetch(
        self,
        x: fx.Node,
        dim: int,
        want: tuple[Rows, ...],
        role: Role,
        reason: str = "",
        *,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        fill: float = 0.0,
        may_be_stale: bool = False,
    ) -> fx.Node:
        """Give each rank the rows `want` of `x` along `dim`, padded with rows of `fill` (law 2, `fetch`).

        A framed result is laid out as the whole value padded by the widest frame. `may_be_stale`: at displaced steps,
        rows of floating-point numbers may be those of an earlier step (law 4).
        """
        layout = layout_of(x)
        if layout.dim not in (None, dim):
            x = self.fetch(x, layout.axis, full(shape_of(x)[layout.axis], self.world), role, reason)
        if x.target is ops.take and x.args[1] == dim and not layout_of(x.args[0]).split:  # type: ignore[arg-type]
            x = x.args[0]  # type: ignore[assignment]  # every rank has the whole value: an input or a table
        have = self.rows(x, dim)
        top, bottom = max(before, default=0), max(after, default=0)
        holes = role == "halo"
        if not top and not bottom and all(w <= h for w, h in zip(want, have, strict=True)):
            return self.take(x, dim, want, holes=holes)
        shape, dtype = shape_of(x), x.meta["dtype"]
        owners = owned(have) if len(set(want)) == 1 else have  # all ranks must get the same bits
        owners = () if owners == have else owners
        declared = Fetch(
            role, shape, dtype, self.world, reason, dim, have, want, before, after, fill, owners,
            may_be_stale=may_be_stale and dtype.is_floating_point,
        )  # fmt: skip
        padded = (*shape[:dim], shape[dim] + top + bottom, *shape[dim + 1 :])
        none = (0,) * self.world
        rows = tuple(
            Rows.interval(w.start + top - b, w.stop + top + a) if b or a else w.shift(top)
            for w, b, a in zip(want, before or none, after or none, strict=True)
        )
        result = WHOLE if rows == full(padded[dim], self.world) else Layout(dim, rows)
        if not layout_of(x).split:
            pads = [0] * (2 * (len(shape) - 1 - dim)) + [per_rank(before or none), per_rank(after or none)]
            args = (self.take(x, dim, want, holes=holes), pads, fill)
            pad = torch.ops.aten.constant_pad_nd.default
            return self.emit(pad, args, shape=padded, dtype=dtype, layout=result, holes=holes)
        return self._exchange(x, declared, padded, result, holes=holes)

    def lay(self, x: fx.Node, layout: Layout, role: Role = "realign", reason: str = "") -> fx.Node:
        """Bring `x` to `layout`; without an exchange where each rank has the rows already."""
        if layout_of(x) == layout:
            return x
        if layout.dim is None:
            return self.whole(x, role, reason)
        return self.fetch(x, layout.dim, layout.rows, role, reason)

    def whole(self, x: fx.Node, role: Role, reason: str = "", *, may_be_stale: bool = False) -> fx.Node:
        layout = layout_of(x)
        if layout.dim is None:
            return x
        everything = full(shape_of(x)[layout.dim], self.world)
        return self.fetch(x, layout.dim, everything, role, reason, may_be_stale=may_be_stale)

    def reduce(self, x: fx.Node, op: ReduceOp = "sum", *, may_be_stale: bool = False) -> fx.Node:
        """Reduce partial results of the whole shape, one per rank, to the whole result."""
        shape, dtype = shape_of(x), x.meta["dtype"]
        stale = may_be_stale and dtype.is_floating_point
        return self._exchange(x, Reduce("sum", shape, dtype, self.world, op=op, may_be_stale=stale), shape, WHOLE)

    def moments(self, x: fx.Node, counts: Sequence[int], *, may_be_stale: bool = False) -> fx.Node:
        """Merge `stack([mean, M2])` of each rank's `counts[k]` elements into `stack([mean, variance])` of all."""
        shape, dtype = shape_of(x), x.meta["dtype"]
        declared = Moments("moments", shape, dtype, self.world, counts=tuple(counts), may_be_stale=may_be_stale)
        return self._exchange(x, declared, shape, WHOLE)

    def owned(self, x: fx.Node) -> fx.Node:
        """Keep each row on one rank only, so that it counts once."""
        layout = layout_of(x)
        return self.take(x, layout.axis, owned(layout.rows))

    def spread(self, rows: tuple[Rows, ...], size: int, *, contiguous: bool = False) -> tuple[Rows, ...] | None:
        """`rows` if no rank is empty (and each has one interval, if `contiguous`), else even rows; None if too few."""
        if all(r.runs and (r.contiguous or not contiguous) for r in rows):
            return rows
        return even(size, self.world) if size >= self.world else None

    def settle(self, x: fx.Node) -> fx.Node:
        """Leave no rank empty: rebalance, or gather a value with fewer rows than ranks."""
        layout = layout_of(x)
        if layout.dim is None or all(r.runs for r in layout.rows):
            return x
        rows = self.spread(layout.rows, shape_of(x)[layout.dim])
        if rows is None:
            return self.whole(x, "small", f"fewer rows than ranks along dim {layout.dim}")
        return self.fetch(x, layout.dim, rows, "rebalance", f"a rank would be empty along dim {layout.dim}")

    def local(self, shape: Sequence[int], layout: Layout) -> list[Any]:
        """The local shape, as an argument of an operator; the size of the split dim differs from rank to rank."""
        return [per_rank(layout.sizes) if d == layout.dim else s for d, s in enumerate(shape)]

    # -- the walk -------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        try:
            return self._split(node, env)
        except SplitError as cannot:
            return self._gather(node, env, str(cannot))

    def _split(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Apply the operator's rule, or split its decomposition; raises `SplitError` if neither is possible."""
        operands: list[fx.Node] = []

        def mapped(n: fx.Node) -> fx.Node:
            operands.append(env[n])
            return env[n]

        args, kwargs = map_arg(node.args, mapped), map_arg(node.kwargs, mapped)
        if not any(layout_of(n).split for n in operands):
            return self._replicate(node, args, kwargs)
        rule = self._rules.get(node.target)
        reason = f"no rule for {node.target}"  # an exception in a variable of this frame would be a reference cycle
        if rule is not None:
            try:
                return rule(self, Op(node, node.target), *args, **kwargs)
            except SplitError as cannot:
                reason = f"{node.target}: {cannot}"
        parts = decompose(node)
        if parts is None:
            raise SplitError(reason)
        try:
            return self._split_parts(parts, operands)
        except SplitError:
            raise SplitError(reason) from None

    def _split_parts(self, parts: fx.Graph, operands: Sequence[fx.Node]) -> Any:
        """Split the operators of a decomposition, applied to `operands`."""
        env: dict[fx.Node, Any] = {}
        supply = iter(operands)
        for node in parts.nodes:
            if node.op == "placeholder":
                env[node] = next(supply)
            elif node.op == "output":
                return map_arg(node.args[0], env.__getitem__)
            elif node.target is operator.getitem:
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self._split(node, env)
        raise AssertionError("a graph without an output")

    def _gather(self, node: fx.Node, env: Mapping[fx.Node, Any], reason: str) -> Any:
        """Gather the operands and run the operator whole on every rank; cut its result as the operands were."""
        split = [layout_of(env[n]) for n in node.all_input_nodes if layout_of(env[n]).split]
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.whole(env[n], "fallback", reason))
        return pytree.tree_map_only(fx.Node, lambda n: self._cut_again(n, split), self._replicate(node, args, kwargs))

    def _cut_again(self, x: fx.Node, layouts: Sequence[Layout]) -> fx.Node:
        """Cut a whole value by the first of `layouts` that fits its shape; needs no exchange."""
        shape = shape_of(x)
        for layout in layouts:
            stop = max(rows.stop for rows in layout.rows)
            if layout.axis < len(shape) and shape[layout.axis] == stop:
                return self.take(x, layout.axis, layout.rows)
        return x

    def _replicate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run the operator on whole operands, on every rank."""
        op = Op(node, node.target)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return self.several(op, args, kwargs, [WHOLE] * len(value))
        return self.same(op, args, kwargs, layout=WHOLE)

    def _with_cut(self, node: fx.Node, value: Any) -> Any:
        if node.name in self._cuts:
            return self.lay(value, self._cuts[node.name], "rebalance", "cut")
        return value

    def _output(self, value: fx.Node, kept: bool) -> fx.Node:
        return value if kept and "holes" not in value.meta else self.whole(value, "output")

    def _exchange(
        self, x: fx.Node, declared: Exchange, shape: Sequence[int], layout: Layout, *, holes: bool = False
    ) -> fx.Node:
        node = self._emit(ops.exchange, ((x,), (declared,)), {}, {})
        return self.emit(operator.getitem, (node, 0), shape=shape, dtype=declared.dtype, layout=layout, holes=holes)

    def _emit(self, target: Any, args: Any, kwargs: Any, meta: dict[str, Any]) -> fx.Node:
        key = call_key(target, args, kwargs)
        if key not in self._memo:
            assert self._node is not None
            about = self._node.meta
            origin: dict[str, Any] = {"path": about.get("path", ""), "origin": about.get("origin", self._node.name)}
            if target is self._node.target and "flops" in about:
                origin |= {"flops": about["flops"], "estimated": about["estimated"]}
            self._memo[key] = append(self._graph, target, args, kwargs, meta | origin)
        return self._memo[key]


def _nodes(tree: Any) -> list[fx.Node]:
    """The nodes among an operator's arguments."""
    found: list[fx.Node] = []
    map_arg(tree, found.append)
    return found


def _is_split(x: fx.Node) -> bool:
    """Whether the ranks hold parts of `x`, or a tuple computed from parts."""
    return layout_of(x).split if "layout" in x.meta else any(map(_is_split, x.all_input_nodes))


def partition(graph: fx.Graph, world: int, cuts: Mapping[str, Layout], rules: Mapping[Any, Rule]) -> fx.Graph:
    """The partitioned form of `graph` on `world` ranks, cut where `cuts` (by node name) say."""
    return Partitioner(graph, world, cuts, rules).run()
