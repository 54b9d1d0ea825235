"""schedule: launch exchanges as early, and await them as late, as the graph allows. Exact: only the order changes.

After this pass an `ops.exchange` node is a launch, and an `ops.wait` on it yields the results. The order is made by
list scheduling: a launch whose operands are ready goes first; while something is under way, any operator that needs no
wait may run, but none from much further down the model, whose values would only take memory; a wait comes when nothing
else can go on. Operators are taken in the order of the launch that they lead to: keys and values before queries.
"""

from __future__ import annotations

import heapq
import operator

from torch import fx

from ..ir import ops
from ..ir.nodes import append, append_copy

AHEAD = 64  #: nodes past the oldest launch under way from which an operator may be taken; launches are taken from any


def schedule(graph: fx.Graph) -> fx.Graph:
    """The graph with launches and waits, in its new order."""
    return _Scheduler(graph).run()


class _Scheduler:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.results = {node: list(node.users) for node in graph.nodes if node.target is ops.exchange}
        self.source = {item: node for node, items in self.results.items() for item in items}
        self.urgency = self._urgencies()
        self.missing = {node: len(set(node.all_input_nodes)) for node in graph.nodes}
        self.launches: list[int] = []
        self.ready: list[tuple[int, int]] = []  # urgency and position of operators that need nothing more
        self.underway: list[int] = []
        self.nodes = list(graph.nodes)
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.nodes:
            if node.op == "placeholder":
                self._place(node)
            elif not node.all_input_nodes:
                self._enter(node)
        while self.launches or self.ready or self.underway:
            if self.launches:
                node = self.nodes[heapq.heappop(self.launches)]
                self._place(node)
                heapq.heappush(self.underway, self.position[node])
            elif (node := self._next()) is not None:
                self._place(node)
            else:
                self._wait(self.nodes[heapq.heappop(self.underway)])
        (output,) = self.graph.find_nodes(op="output")
        self._place(output)
        self.new.lint()
        return self.new

    def _next(self) -> fx.Node | None:
        """The most urgent operator that may go on now."""
        if not self.underway:
            return self.nodes[heapq.heappop(self.ready)[1]] if self.ready else None
        limit = self.underway[0] + AHEAD
        kept = []
        found = None
        while self.ready and found is None:
            entry = heapq.heappop(self.ready)
            if entry[1] <= limit:
                found = self.nodes[entry[1]]
            else:
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self.ready, entry)
        return found

    def _place(self, node: fx.Node) -> None:
        self.env[node] = append_copy(self.new, node, self.env.__getitem__)
        if node not in self.results:
            self._done(node)

    def _wait(self, node: fx.Node) -> None:
        launch = self.env[node]
        wait = append(self.new, ops.wait, (launch, launch.args[0]), meta=node.meta)
        for item in self.results[node]:
            self.env[item] = append(self.new, operator.getitem, (wait, item.args[1]), meta=item.meta)
            self._done(item)

    def _done(self, node: fx.Node) -> None:
        for user in node.users:
            self.missing[user] -= 1
            if not self.missing[user]:
                self._enter(user)

    def _enter(self, node: fx.Node) -> None:
        """The node has all that it needs."""
        if node.op != "call_function" or node in self.source:
            return
        if node in self.results:
            heapq.heappush(self.launches, self.position[node])
        else:
            heapq.heappush(self.ready, (self.urgency[node], self.position[node]))

    def _urgencies(self) -> dict[fx.Node, int]:
        """Of each node, the position of the first launch that it leads to; past the end if to none."""
        urgency: dict[fx.Node, int] = {}
        for node in reversed(self.graph.nodes):
            after = [self.position[u] if u in self.results else urgency[u] for u in node.users]
            urgency[node] = min(after, default=len(self.position))
        return urgency
