"""schedule: launch exchanges as early and wait for them as late as possible. Exact: only the order changes.

After this pass an `ops.exchange` node is a launch, and an `ops.wait` on it has the results. List scheduling: a launch
whose operands are ready goes first. While a message is in flight, any ready operator may run, except operators from
much further down the model, whose results would only occupy memory. A wait comes when nothing else is ready. Operators
are ordered by the launch that they lead to: keys and values before queries.

Where stages work at once, they first send and wait for what the timestep decides: work that came before would keep the
others waiting.
"""

from __future__ import annotations

import heapq
import operator

from torch import fx

from ..ir import ops
from ..ir.nodes import append, append_copy
from ..ir.transfer import Transfer

AHEAD = 64  #: an operator may run at most so many nodes past the oldest launch in flight; launches have no limit


def schedule(graph: fx.Graph) -> fx.Graph:
    """The graph with launches and waits, reordered."""
    return _Scheduler(graph).run()


class _Scheduler:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.results = {node: list(node.users) for node in graph.nodes if node.target is ops.exchange}
        self.source = {item: node for node, items in self.results.items() for item in items}
        self.first = self._first()
        self.urgency = self._urgencies()
        self.missing = {node: len(set(node.all_input_nodes)) for node in graph.nodes}
        self.launches: list[int] = []
        self.ready: list[tuple[int, int]] = []  # (urgency, position) of operators whose operands are ready
        self.in_flight: list[int] = []
        self.nodes = list(graph.nodes)
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.nodes:
            if node.op == "placeholder":
                self._place(node)
            elif not node.all_input_nodes:
                self._queue(node)
        while self.launches or self.ready or self.in_flight:
            if self.launches:
                node = self.nodes[heapq.heappop(self.launches)]
                self._place(node)
                heapq.heappush(self.in_flight, self.position[node])
            elif (node := self._next()) is not None:
                self._place(node)
            else:
                self._wait(self.nodes[heapq.heappop(self.in_flight)])
        (output,) = self.graph.find_nodes(op="output")
        self._place(output)
        self.new.lint()
        return self.new

    def _next(self) -> fx.Node | None:
        """Remove and return the most urgent operator that may run now."""
        if not self.in_flight:
            return self.nodes[heapq.heappop(self.ready)[1]] if self.ready else None
        limit = self.in_flight[0] + AHEAD
        if self.in_flight[0] <= self.first:
            limit = min(limit, self.first)
        beyond = []
        found = None
        while self.ready and found is None:
            entry = heapq.heappop(self.ready)
            if entry[1] <= limit:
                found = self.nodes[entry[1]]
            else:
                beyond.append(entry)
        for entry in beyond:
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
                self._queue(user)

    def _queue(self, node: fx.Node) -> None:
        """Queue a node whose operands are ready."""
        if node.op != "call_function" or node in self.source:
            return
        if node in self.results:
            heapq.heappush(self.launches, self.position[node])
        else:
            heapq.heappush(self.ready, (self.urgency[node], self.position[node]))

    def _first(self) -> int:
        """Where stages work at once, the position of the last message that they send before that; else -1."""
        late = next((node for node in self.results if _is_late(node)), None)
        before = [self.position[node] for node in self.results if late and self.position[node] < self.position[late]]
        return max(before, default=-1)

    def _urgencies(self) -> dict[fx.Node, int]:
        """For each node, the position of the first launch that depends on it; past the end if none does."""
        urgency: dict[fx.Node, int] = {}
        for node in reversed(self.graph.nodes):
            after = [self.position[u] if u in self.results else urgency[u] for u in node.users]
            urgency[node] = min(after, default=len(self.position))
        return urgency


def _is_late(node: fx.Node) -> bool:
    """Whether an exchange gives other stages values of the last step."""
    first = node.args[1][0]  # type: ignore[index]
    return isinstance(first, Transfer) and first.fresh == "stale"
