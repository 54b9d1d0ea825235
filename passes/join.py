"""join: make the graph of all ranks from that of one group: groups take their samples, outputs are gathered. Exact.

The ranks of a group exchange along the axis "patches"; those that hold the same patch gather the outputs of all groups
along the axis "samples".
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.fetch import Fetch
from ..ir.layout import WHOLE, PerRank, full, owned
from ..ir.mesh import Mesh
from ..ir.nodes import append, append_copy
from ..ir.program import shape_of
from .samples import Samples


def join(graph: fx.Graph, whole: fx.Graph, samples: Samples, mesh: Mesh) -> fx.Graph:
    """The graph of all ranks of a mesh.

    Args:
        graph: the partitioned graph of one group.
        whole: the program of all samples.
    """
    return _Joiner(whole, samples, mesh).run(graph)


class _Joiner:
    def __init__(self, whole: fx.Graph, samples: Samples, mesh: Mesh) -> None:
        self.whole = {node.name: node for node in whole.nodes if node.op == "placeholder"}
        (output,) = whole.find_nodes(op="output")
        self.outputs: Sequence[fx.Node] = output.args[0]
        self.samples = samples
        self.mesh = mesh
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}

    def run(self, graph: fx.Graph) -> fx.Graph:
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            self.env[node] = append_copy(self.graph, node)
        for node in placeholders:
            if node.name in self.samples.taken:
                self.env[node] = self._taken(node)
        for node in graph.nodes:
            if node.op == "output":
                self.graph.output(self._gathered([self.env[each] for each in node.args[0]]))
            elif node.op != "placeholder":
                self.env[node] = new = append_copy(self.graph, node, self.env.__getitem__)
                if node.target is ops.exchange:
                    along = self.mesh.along_patches
                    new.args = (new.args[0], tuple(replace(each, axis=along) for each in node.args[1]))
        self.graph.lint()
        return self.graph

    def _taken(self, node: fx.Node) -> fx.Node:
        """What a group takes of a placeholder."""
        source, layout = self.env[node], self.samples.taken[node.name]
        described: dict[str, Any] = {"dtype": node.meta["dtype"], "layout": WHOLE, "path": "", "origin": node.name}
        described |= {"shape": shape_of(node)}
        source.meta |= {"shape": self._shape(self.whole[node.name])}
        if self.samples.calls > 1:
            call = PerRank(tuple(range(self.samples.calls)), self.mesh.along_samples)
            return append(self.graph, torch.ops.aten.select.int, (source, 0, call), meta=described)
        rows = PerRank(layout.rows, self.mesh.along_samples)
        return append(self.graph, ops.take, (source, layout.axis, rows), meta=described)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of an input or output of all groups."""
        return (self.samples.calls, *shape_of(node)) if self.samples.calls > 1 else shape_of(node)

    def _stacked(self, part: fx.Node) -> fx.Node:
        """A group's output as its part of those of all calls."""
        if self.samples.calls == 1:
            return part
        meta = {key: part.meta[key] for key in ("dtype", "layout", "path", "origin") if key in part.meta}
        return append(
            self.graph, torch.ops.aten.unsqueeze.default, (part, 0), meta=meta | {"shape": (1, *shape_of(part))}
        )

    def _gathered(self, parts: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """The whole outputs, gathered in one message from the `parts` that the groups have computed."""
        split = [i for i, layout in enumerate(self.samples.results) if layout.split]
        parts = [self._stacked(part) for part in parts]
        nodes = list(dict.fromkeys(parts[i] for i in split))
        declared = {parts[i]: self._declared(i) for i in split}
        about = {"path": nodes[0].meta.get("path", ""), "origin": nodes[0].meta.get("origin", nodes[0].name)}
        gather = append(self.graph, ops.exchange, (tuple(nodes), tuple(declared[node] for node in nodes)), meta=about)
        results: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(nodes):
            each = declared[node]
            described: dict[str, Any] = {"shape": each.shape, "dtype": each.dtype, "layout": WHOLE}
            results[node] = append(self.graph, operator.getitem, (gather, i), meta=about | described)
        return tuple(results.get(node, node) if i in split else node for i, node in enumerate(parts))

    def _declared(self, i: int) -> Fetch:
        """The gather of an output along its batch."""
        shape, layout = self._shape(self.outputs[i]), self.samples.results[i]
        groups = self.mesh.groups
        want, owners = full(shape[layout.axis], groups), owned(layout.rows)
        return Fetch(
            "output", shape, self.outputs[i].meta["dtype"], groups, "", layout.axis, layout.rows, want,
            owners=() if owners == layout.rows else owners, axis=self.mesh.along_samples,
        )  # fmt: skip
