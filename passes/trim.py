"""trim: compute replicated values only on the rows each rank uses. Exact.

A value that depends on nothing that is cut is whole on every rank: embeddings of per-token timesteps, a table of
positions. If all its users take rows of it, its operator gets rows of its operands instead, and the operands are
visited in turn, back to the inputs. The operator's `pull_back` proposes the rows of the operands, its rule confirms
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from ..ir import ops
from ..ir.exchange import Exchange
from ..ir.layout import Layout, owned
from ..ir.nodes import copied
from ..ir.operators import spec_of
from ..ir.program import calls, layout_of, shape_of
from .partition import Op, Partitioner, Rule, SplitError


def trim(graph: fx.Graph, source: fx.Graph, world: int, rules: Mapping[Any, Rule]) -> fx.Graph:
    """The trimmed form of `graph`, which is `source` partitioned; `graph` itself if there is nothing to trim."""
    if not _Trimmer(graph, source, world, rules).has_work:
        return graph
    return _Trimmer(copied(graph), source, world, rules).run()


class _Trimmer(Partitioner):
    """Edits a partitioned graph; never adds an exchange."""

    def __init__(self, graph: fx.Graph, source: fx.Graph, world: int, rules: Mapping[Any, Rule]) -> None:
        super().__init__(source, world, {}, rules)
        self._graph = graph
        self._origins = {node.name: node for node in source.nodes}
        self._takes: dict[tuple[Any, Layout], fx.Node] = {
            (n.args[0], layout_of(n)): n for n in graph.nodes if n.target is ops.take
        }

    @property
    def has_work(self) -> bool:
        """Whether any operator might be computed on fewer rows."""
        return any(self._wanted(x) is not None and self._op(x) is not None for x in calls(self._graph))

    def run(self) -> fx.Graph:
        for node in reversed(list(calls(self._graph))):
            self.visit(node)
        return self._graph

    def visit(self, x: fx.Node) -> None:
        if not x.users:
            self._erase(x)
            return
        wanted, op = self._wanted(x), self._op(x)
        if wanted is None or op is None:
            return
        pull_back = spec_of(x.target).pull_back or _same_rows
        for operands in pull_back(x, wanted):
            self._node, self._memo = x, {}
            with self._graph.inserting_before(x):
                result = self._from_rows(op, x, wanted, operands)
                if result is not None:
                    self._replace(x, result)
                    return
            for node in reversed(list(self._memo.values())):
                if not node.users:
                    self._erase(node)

    def _op(self, x: fx.Node) -> Op | None:
        """The operator of the source graph that `x` is, if its operands are whole and it has a rule."""
        source = self._origins.get(x.meta.get("origin", ""))
        if source is None or x.target not in self._rules or any(layout_of(a).split for a in x.all_input_nodes):
            return None
        same = source.target is x.target and source.meta.get("shape") == x.meta.get("shape")
        return Op(source, x.target) if same else None

    def _wanted(self, x: fx.Node) -> Layout | None:
        """The rows of a whole value that its users take; None if a user or every rank needs all rows."""
        if layout_of(x).split or any(user.target is not ops.take for user in x.users):
            return None
        layouts = [layout_of(user) for user in x.users]
        dims = {layout.dim for layout in layouts}
        if len(dims) > 1 or None in dims:
            return None
        rows = layouts[0].rows
        for layout in layouts[1:]:
            rows = tuple(a | b for a, b in zip(rows, layout.rows, strict=True))
        dim, size = layouts[0].axis, shape_of(x)[layouts[0].axis]
        divided = all(r.runs for r in rows) and sum(map(len, owned(rows))) == size and min(map(len, rows)) < size
        return Layout(dim, rows) if divided else None

    def _from_rows(self, op: Op, x: fx.Node, wanted: Layout, operands: dict[fx.Node, Layout]) -> fx.Node | None:
        """`wanted` rows of `x`, if the operator's rule computes exactly these from the given rows of its operands."""
        rows = {a: self._rows_of(a, layout) for a, layout in operands.items()}
        args, kwargs = map_arg((x.args, x.kwargs), lambda a: rows.get(a, a))
        try:
            if not rows:  # expanded along the dim
                return self.same(op, (args[0], self.local(op.shape, wanted)), layout=wanted)
            result = self._rules[op.target](self, op, *args, **kwargs)
        except SplitError:
            return None
        return result if isinstance(result, fx.Node) and layout_of(result) == wanted else None

    def _rows_of(self, a: fx.Node, layout: Layout) -> fx.Node:
        """Take rows of `a`. Users share one take, which moves before the node that is visited."""
        taken = self._takes.get((a, layout))
        assert self._node is not None
        if taken is None:
            taken = self._takes[a, layout] = self.take(a, layout.axis, layout.rows)
        elif self._node < taken:
            self._node.prepend(taken)
        return taken

    def _replace(self, x: fx.Node, result: fx.Node) -> None:
        for user in list(x.users):
            layout, holes = layout_of(user), "holes" in user.meta
            user.replace_all_uses_with(self.take(result, layout.axis, layout.rows, holes=holes))
            self._erase(user)
        self._erase(x)

    def _erase(self, node: fx.Node) -> None:
        if node.target is ops.take:
            self._takes.pop((node.args[0], layout_of(node)), None)
        self._graph.erase_node(node)

    def _exchange(self, x: fx.Node, declared: Exchange, shape: Any, layout: Layout, *, holes: bool = False) -> fx.Node:
        raise SplitError("a value that every rank has needs no exchange")


def _same_rows(x: fx.Node, wanted: Layout) -> Iterator[dict[fx.Node, Layout]]:
    """The same rows of the operands that have them, with broadcasting."""
    shape = shape_of(x)
    places = {a: wanted.axis - (len(shape) - len(shape_of(a))) for a in x.all_input_nodes}
    same = {
        a: wanted.at(place) for a, place in places.items() if place >= 0 and shape_of(a)[place] == shape[wanted.axis]
    }
    if same:
        yield same
    first: Any = x.args[0]
    if len(same) > 1 and isinstance(first, fx.Node) and first in same:  # weights, keys and values are whole
        yield {first: same[first]}
