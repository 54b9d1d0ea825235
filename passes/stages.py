"""stages: cut the model by depth, so that each stage of ranks runs a part of it, with the weights of that part.

Every operator gets the ranks that run it (`meta["placed"]`), and what another stage reads is sent there. What free
operators give other stages goes first, in few messages; other values, one by one, right after they are made. The
outputs go to all stages.

If the strategy lets stages work at once (law 4), what becomes of the sample is stale at displaced steps where another
stage reads it, and what depends on the conditioning alone is sent at exact steps only. What the timestep decides is
sent first and fresh, for which no stage has to wait long; and so are the outputs, at the end.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..ir import ops
from ..ir.inputs import moving_names, sampled_names
from ..ir.mesh import Mesh
from ..ir.nodes import append, append_copy
from ..ir.program import Program, calls, layout_of, reached, shape_of
from ..ir.strategy import Strategy
from ..ir.transfer import Transfer
from .bucket import order_of
from .displace import depending, displaced
from .stage_cuts import OPERANDS, Depth, assign
from .targets import Target

Way = tuple[int, tuple[int, ...]]  #: the stage that sends a value, and those that get it


def stages(graph: fx.Graph, program: Program, mesh: Mesh, target: Target, strategy: Strategy) -> fx.Graph:
    """The graph with the ranks of each operator, and with transfers between stages, as fresh as the strategy says.

    Raises:
        WorldSizeError: the model cannot be cut into so many stages.
    """
    depth = Depth.of(graph, program, mesh.patches, target)
    return _Placer(graph, depth, mesh, program, strategy).run()


class _Placer:
    def __init__(self, graph: fx.Graph, depth: Depth, mesh: Mesh, program: Program, strategy: Strategy) -> None:
        self.source = graph
        self.mesh = mesh
        self.every = tuple(range(mesh.stages))
        self.stages = assign(depth, mesh.stages).of
        self.strategy = strategy
        self.moving = depending(graph, moving_names(program))
        self.sampled = depth.trunk & depending(graph, sampled_names(program))
        self.trunk = self.sampled if strategy.overlaps else depth.trunk  #: what is sent right after it is made
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.sent: dict[fx.Node, fx.Node] = {}  #: values after they were sent
        self.ways = {node: way for node in calls(graph) if (way := self._way(node))}

    def run(self) -> fx.Graph:
        for node in self.source.nodes:
            if node.op == "placeholder":
                self._copy(node)
        self._free()
        for node in calls(self.source):
            if node not in self.env:
                self._copy(node)
            if node in self.ways and node in self.trunk:
                self._send([node], self.ways[node])
        (output,) = self.source.find_nodes(op="output")
        self._outputs(output)
        values = (self.sent[each] if self._late(each) else self._operand(output, each) for each in output.args[0])
        self.graph.output(type(output.args[0])(values))
        self.graph.lint()
        return self.graph

    def _free(self) -> None:
        """Free operators whose results travel, with what they need: after so many transfers, then these results."""
        first = [node for node in self.ways if node not in self.trunk]
        before = reached(first, OPERANDS)
        level: defaultdict[fx.Node, int] = defaultdict(int)
        for node in calls(self.source):
            if node in before:
                level[node] = max((level[each] + self._travels(node, each) for each in node.all_input_nodes), default=0)
        for number in range(1 + max((level[node] for node in first), default=-1)):
            messages: defaultdict[tuple[Way, bool], list[fx.Node]] = defaultdict(list)
            for node in [node for node in calls(self.source) if node in before and level[node] == number]:
                self._copy(node)
                if node in self.ways:
                    messages[self.ways[node], self._late(node)].append(node)
            for values in messages.values():
                self._send(values, self.ways[values[0]])

    def _outputs(self, output: fx.Node) -> None:
        """Send the outputs of which other stages have none, or what was made at an earlier step."""
        messages: defaultdict[Way, list[fx.Node]] = defaultdict(list)
        for node in dict.fromkeys(output.args[0]):  # type: ignore[arg-type]
            if self._late(node):
                messages[self._to_all(node)].append(node)
        for way, values in messages.items():
            self._send(values, way, fresh=True)

    def _late(self, node: fx.Node) -> bool:
        """Whether stages that are sent a value may have one of an earlier step."""
        return self.strategy.overlaps and node.op == "call_function" and self._may_be_stale(node)

    def _may_be_stale(self, node: fx.Node) -> bool:
        """Whether the next stage may read what was made of an earlier sample, or of the same conditioning."""
        return node in self.sampled or node not in self.moving

    def _to_all(self, node: fx.Node) -> Way:
        """From the stage that makes a value to all others."""
        made = self._of(node)[0]
        return made, tuple(stage for stage in self.every if stage != made)

    def _of(self, node: fx.Node) -> tuple[int, ...]:
        """The stages that have a value."""
        return self.stages.get(node, self.every)

    def _travels(self, reader: fx.Node, node: fx.Node) -> bool:
        """Whether a stage that runs `reader` has to be sent the value."""
        return not set(self._of(reader)) <= set(self._of(node))

    def _way(self, node: fx.Node) -> Way | None:
        """From which stage to which ones a value is sent; None if it is not."""
        own = self._of(node)
        if not self._late(node) and own != self.every and any(user.op == "output" for user in node.users):
            return self._to_all(node)
        others = {stage for user in node.users if user.op != "output" for stage in self._of(user)}.difference(own)
        assert not others or len(own) == 1
        return (own[0], tuple(sorted(others))) if others else None

    def _operand(self, reader: fx.Node, node: fx.Node) -> fx.Node:
        return self.sent[node] if self._travels(reader, node) else self.env[node]

    def _copy(self, node: fx.Node) -> None:
        self.env[node] = new = append_copy(self.graph, node, lambda each: self._operand(node, each))
        own = self._of(node)
        if node.target is ops.exchange:
            ranks = self.mesh.ranks_of(own)
            along = self.mesh.along_patches
            new.update_arg(1, tuple(replace(e, axis=(e.axis or along).among(ranks)) for e in new.args[1]))  # type: ignore[union-attr]
        self._place(new, own)

    def _place(self, new: fx.Node, own: Sequence[int]) -> None:
        if len(own) < self.mesh.stages:
            new.meta["placed"] = self.mesh.ranks_of(own)

    def _send(self, values: Sequence[fx.Node], way: Way, *, fresh: bool = False) -> None:
        """Send values that go the same way in one message. `fresh`: they are never stale."""
        own = (way[0], *way[1])
        axis = self.mesh.across(own)
        declared = tuple(
            Transfer(
                "transfer", shape_of(node), node.meta["dtype"], axis.size,
                order=order_of(node), axis=axis, patches=self.mesh.patches, layout=layout_of(node),
                may_be_stale=not fresh and self._may_be_stale(node),
            )
            for node in values
        )  # fmt: skip
        declared = displaced(declared, self.strategy, steady=values[0] not in self.moving)
        about = {key: values[0].meta[key] for key in ("path", "origin") if key in values[0].meta}
        launch = append(self.graph, ops.exchange, (tuple(self.env[node] for node in values), declared), meta=about)
        self._place(launch, own)
        for i, node in enumerate(values):
            described: dict[str, Any] = {key: value for key, value in node.meta.items() if key != "placed"}
            self.sent[node] = append(self.graph, operator.getitem, (launch, i), meta=described)
            self._place(self.sent[node], own)
