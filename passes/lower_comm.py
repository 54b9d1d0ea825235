"""lower_comm: from a rank's scheduled graph to its step programs, in which exchanges are ordinary operators.

    ops.exchange, ops.wait  ->  pack, put, get, unpack; of displaced steps: witness, forecast, estimate, codes

A put stands where the launch stood. In an exact step a get stands where the wait stood. In a displaced one it stands
right before the put: it gets the message of the last step, which makes room for that of this step. What else a
displaced step reads of earlier steps is state. An exchange node has one channel; where displaced steps send something
else than exact ones (windows, codes) it has two.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import fx

from ..ir import comm, ops
from ..ir.comm import received_shape
from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.garbage import collection_paused
from ..ir.merge import Moments
from ..ir.nodes import append, append_copy
from ..ir.program import specialize
from ..ir.step import PACE, ChannelSpec, Mode, StateSpec, StepProgram, shared_buffers, verify_step
from ..ir.transfer import Transfer


class StepPrograms:
    """The step programs of one rank; each is made when it is first asked for.

    Args:
        graph: the scheduled graph for all ranks.
        every: the operators of all stages, one after the other, as no rank runs them: for predictions.
    """

    @collection_paused()
    def __init__(self, graph: fx.Graph, rank: int, *, every: bool = False) -> None:
        self.rank = rank
        self._every = every
        self._local = specialize(graph, rank, every=every)
        launches = list(graph.find_nodes(op="call_function", target=ops.exchange))
        waits = list(graph.find_nodes(op="call_function", target=ops.wait))
        closing = [launches[-1]] if launches and waits[-1].args[0] is launches[-1] else []
        known = {node.name: _site(node, rank, i, node in closing) for i, node in enumerate(launches)}
        #: of all ranks: where this one takes no part, its program does not use them
        self.channels = tuple(channel for site in known.values() for channel in site.channels)
        own = self._local.find_nodes(op="call_function", target=ops.exchange)
        self._sites = {node: known[node.name] for node in own}
        sites = self._sites.values()
        self.state = tuple(spec for site in sites for spec in site.state)
        self._apart = any(site.wire is not site.now for site in sites)
        self._forecast = any(each.forecast or each.needs_sent for site in sites for each in site.exchanges)
        self._made: dict[Mode, StepProgram] = {}

    @property
    def stale(self) -> bool:
        """Whether displaced steps differ from exact ones."""
        return any(site.stale for site in self._sites.values())

    def canonical(self, mode: Mode) -> Mode:
        """The mode whose program serves for `mode`: several have the same one if nothing tells them apart."""
        if not self.stale:
            return "exact"
        if mode.endswith("unpaced") and not self._forecast:
            mode = "first" if mode == "first unpaced" else "steady"
        if not self._apart:
            mode = {"first": "steady", "first unpaced": "steady unpaced"}.get(mode, mode)  # type: ignore[assignment]
        return mode

    @collection_paused()
    def __getitem__(self, mode: Mode) -> StepProgram:
        mode = self.canonical(mode)
        if mode not in self._made:
            numbers = {channel: i for i, channel in enumerate(self.channels)}
            graph = _Lowering(self._local, mode, self._sites, numbers, self.state, every=self._every).run()
            self._made[mode] = program = StepProgram(self.rank, mode, graph, self.channels, self.state)
            verify_step(program)
        return self._made[mode]


@dataclass(frozen=True, eq=False)
class _Site:
    """An exchange node: its channels and its state on one rank."""

    rank: int  #: as the exchanges count it
    exchanges: tuple[Exchange, ...]
    now: ChannelSpec | None  #: of exact steps; None if nothing ever travels
    wire: ChannelSpec | None  #: of displaced steps
    state: tuple[StateSpec, ...]
    names: tuple[dict[str, str], ...]  #: of each exchange: what is kept -> the placeholder

    @property
    def channels(self) -> tuple[ChannelSpec, ...]:
        return tuple(dict.fromkeys(channel for channel in (self.now, self.wire) if channel is not None))

    @property
    def stale(self) -> bool:
        return self.exchanges[0].fresh != "sync"

    @property
    def transfer(self) -> Transfer | None:
        """The first exchange, if these give values to other stages."""
        first = self.exchanges[0]
        return first if isinstance(first, Transfer) else None


def _site(node: fx.Node, rank: int, index: int, last: bool) -> _Site:
    """The site of an exchange node.

    Args:
        rank: of the mesh.
        index: its number, which makes names unique.
        last: it is launched and awaited after all others.
    """
    exchanges = node.args[1]
    rank = exchanges[0].place(rank)  # type: ignore[union-attr, index]
    wires = tuple(each.wire for each in exchanges)  # type: ignore[union-attr]
    one = wires == exchanges
    stale = exchanges[0].fresh != "sync" and exchanges[0].repeated  # type: ignore[union-attr]
    closing = last and exchanges[0].fresh == "sync" and _reaches_all(exchanges)  # type: ignore[union-attr, arg-type]
    now = _channel(node, exchanges, late=stale and one, closing=closing)  # type: ignore[arg-type]
    wire = now if one else _channel(node, wires, late=True, suffix=".displaced")
    state: list[StateSpec] = []
    names: list[dict[str, str]] = []
    for i, each in enumerate(exchanges):  # type: ignore[arg-type]
        kept = comm.kept_shapes(each, rank, one)
        names.append({what: f"state_{index}_{i}_{what}" for what in kept})
        state += [StateSpec(names[-1][what], shape, each.dtype) for what, shape in kept.items()]
    return _Site(rank, exchanges, now, wire, tuple(state), tuple(names))  # type: ignore[arg-type]


def _channel(
    node: fx.Node, exchanges: tuple[Exchange, ...], late: bool, *, suffix: str = "", closing: bool = False
) -> ChannelSpec | None:
    silent = not any(each.messages for each in exchanges)
    return None if silent else ChannelSpec(node.name + suffix, node.meta.get("path", ""), exchanges, late, closing)


def _reaches_all(exchanges: tuple[Exchange, ...]) -> bool:
    """Whether every rank sends something to every other."""
    axis, pairs = exchanges[0].axis, permutations(range(exchanges[0].world), 2)
    return (axis is None or axis.size == axis.world) and all(
        any(each.numel(src, dst) for each in exchanges) for src, dst in pairs
    )


class _Lowering:
    """Writes the program of one mode."""

    def __init__(
        self,
        source: fx.Graph,
        mode: Mode,
        sites: dict[fx.Node, _Site],
        channels: dict[ChannelSpec, int],
        state: Iterable[StateSpec],
        *,
        every: bool = False,
    ) -> None:
        self.every = every
        self.source = source
        self.mode = mode
        self.sites = sites
        self.channels = channels
        self.state = tuple(state)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.held: dict[str, fx.Node] = {}  #: placeholders of the state
        self.after: dict[str, fx.Node] = {}  #: new values of the state
        self.last: dict[_Site, list[fx.Node]] = {}  #: what was got before a put: the messages of the last step
        self.paced = not mode.endswith("unpaced")
        self.node: fx.Node | None = None  #: being lowered
        self.pace: fx.Node | None = None  #: its placeholder

    def run(self) -> fx.Graph:
        for node in self.source.nodes:
            self.node = node
            if node.op == "placeholder":
                self.env[node] = append_copy(self.graph, node)
                continue
            if self.pace is None:
                self._begin()
            if node.op == "output":
                outputs = [self.env[value] for value in node.args[0]]
                self.graph.output((outputs, [self.after.get(s.name, self.held[s.name]) for s in self.state]))
            elif node.target is ops.exchange:
                self._launch(node)
            elif node.target is ops.wait:
                self.env[node] = self._wait(node.args[0])
            elif node.target is operator.getitem and isinstance(self.env[node.args[0]], list):
                self.env[node] = result = self.env[node.args[0]][node.args[1]]
                if "placed" in result.meta or result.op == "placeholder":  # on the rank that sends it, or kept
                    continue
                if self.mode == "exact" or not node.meta.get("resized"):
                    result.meta.update(node.meta)
            else:
                self.env[node] = append_copy(self.graph, node, self.env.__getitem__)
        self._close()
        self.graph.lint()
        return self.graph

    def _close(self) -> None:
        """Let the step end with the closing message: what does not read it goes before its put.

        What follows the put reads copies of other messages.
        """
        closing = {number for channel, number in self.channels.items() if channel.closing}
        puts = self.graph.find_nodes(op="call_function", target=comm.put)
        put = next((node for node in puts if node.args[1] in closing), None)
        if put is None:
            return
        after: set[fx.Node] = set()  #: what reads it
        node = put.next
        while node.op != "output":
            here, node = node, node.next
            if (here.target is comm.get and here.args[0] in closing) or after.intersection(here.all_input_nodes):
                after.add(here)
            else:
                put.prepend(here)
        shared = shared_buffers(self.graph)
        copies: dict[fx.Node, fx.Node] = {}
        for node in [node for node in self.graph.nodes if node in after]:  # others may write to their buffers by then
            for used in node.all_input_nodes:
                if used not in after and shared.get(used, closing) - closing:
                    if used not in copies:
                        with self.graph.inserting_before(put):
                            copies[used] = self.graph.call_function(torch.ops.aten.clone.default, (used,))
                        copies[used].meta.update(used.meta)
                    node.replace_input_with(used, copies[used])

    def _begin(self) -> None:
        """The placeholders beside those of the model, and what every step does first."""
        meta = {"shape": (), "local_shape": (), "dtype": torch.float64}
        self.pace = self._placeholder(PACE, meta)
        for spec in self.state:
            meta = {"shape": spec.shape, "local_shape": spec.shape, "dtype": spec.dtype}
            self.held[spec.name] = self._placeholder(spec.name, meta)

    def _placeholder(self, name: str, meta: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node("placeholder", name, name=name)
        node.meta.update(meta)
        return node

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        assert self.node is not None
        meta = {key: value for key, value in self.node.meta.items() if key in ("path", "origin")}
        return append(self.graph, target, args, meta=meta)

    # -- an exchange node ----------------------------------------------------------------------------------------

    def _launch(self, node: fx.Node) -> None:
        site = self.sites[node]
        values = [self.env[value] for value in node.args[0]]  # type: ignore[union-attr]
        if not site.stale or self.mode == "exact":
            if self._keeps_last(site):
                self.last[site] = self._get(site, site.now, site.exchanges, values)
            self._put(site, site.now, site.exchanges, values)
        elif site.exchanges[0].repeated:
            wires = [each.wire for each in site.exchanges]
            if (site.now is site.wire or not self.mode.startswith("first")) and not self._only_sends(site):
                self.last[site] = self._get(site, site.wire, wires, values)
            self._put(site, site.wire, wires, [self._outgoing(site, i, x) for i, x in enumerate(values)])

    def _only_sends(self, site: _Site) -> bool:
        """Whether this rank gives values to other stages."""
        return site.transfer is not None and site.transfer.sends(site.rank) and not self.every

    def _only_receives(self, site: _Site) -> bool:
        """Whether this rank is given values by another stage."""
        return site.transfer is not None and not site.transfer.sends(site.rank) and not self.every

    def _keeps_last(self, site: _Site) -> bool:
        """Whether an exact step keeps the last step's message, which its channel holds, for forecasts."""
        return any("before" in names and "received" not in names for names in site.names)

    def _put(
        self, site: _Site, channel: ChannelSpec | None, exchanges: Iterable[Exchange], values: list[fx.Node]
    ) -> None:
        if self._only_receives(site):
            nothing: tuple[Any, ...] = ((None,) * site.exchanges[0].world,) * len(site.exchanges)
            self._emit(comm.put, nothing, self.channels[site.channels[0]])
        elif channel is not None:
            packed = [self._emit(comm.pack, x, each, site.rank) for x, each in zip(values, exchanges, strict=True)]
            self._emit(comm.put, tuple(packed), self.channels[channel])

    def _get(
        self, site: _Site, channel: ChannelSpec | None, exchanges: Iterable[Exchange], values: list[fx.Node]
    ) -> list[fx.Node]:
        """Receive buffers; where nothing travels they have no others' rows."""
        if channel is None:
            return [
                self._emit(torch.ops.aten.new_empty.default, x, list(received_shape(each, site.rank)))
                for x, each in zip(values, exchanges, strict=True)
            ]
        buffers = self._emit(comm.get, self.channels[channel])
        received = []
        for i, each in enumerate(channel.exchanges):
            received.append(self._emit(operator.getitem, buffers, i))
            received[i].meta |= {"local_shape": received_shape(each, site.rank), "dtype": each.dtype}
        return received

    def _outgoing(self, site: _Site, i: int, x: fx.Node) -> fx.Node:
        """What a displaced step sends of `x`."""
        name = site.names[i].get("known")
        if name is None:
            return x
        codes = self._emit(comm.encode_change, x, self.held[name], site.exchanges[i], site.rank)
        self.after[name] = self._emit(operator.getitem, codes, 1)
        return self._emit(operator.getitem, codes, 0)

    def _wait(self, launch: fx.Node) -> list[fx.Node]:
        """The results of an exchange node; keeps what later steps read of it."""
        site = self.sites[launch]
        values = [self.env[value] for value in launch.args[0]]  # type: ignore[union-attr]
        if site.transfer:
            return self._transferred(site, values)
        if self.mode != "exact" and site.stale:
            received = self._earlier(site, values)
            return [self._displaced(site, i, each, values[i], received[i]) for i, each in enumerate(site.exchanges)]
        received = self._get(site, site.now, site.exchanges, values)
        if site.stale:
            last = self.last.get(site, received)
            for i, each in enumerate(site.exchanges):
                self._keep_exact(site, i, each, values[i], received[i], last[i])
        return [
            self._emit(comm.unpack, x, part, each, site.rank)
            for x, part, each in zip(values, received, site.exchanges, strict=True)
        ]

    def _transferred(self, site: _Site, values: list[fx.Node]) -> list[fx.Node]:
        """The own values on the ranks that send them; on others what they get, or got at the last step."""
        if self._only_sends(site):
            return values
        if site.stale and self.mode != "exact":
            kept = [names.get("received") for names in site.names]
            return self.last.get(site) or [self.held[name] if name else values[i] for i, name in enumerate(kept)]
        received = self._get(site, site.now, site.exchanges, values)
        for names, buffer in zip(site.names, received, strict=True):
            if "received" in names:
                self.after[names["received"]] = buffer
        return received

    def _earlier(self, site: _Site, values: list[fx.Node]) -> list[fx.Node]:
        """What the others sent at the last step, or at the last exact one."""
        if site.exchanges[0].fresh == "local":
            return values  # not read
        if site not in self.last:
            return [self.held[each["received"]] for each in site.names]
        arrived = self.last[site]
        for i, (each, names) in enumerate(zip(site.exchanges, site.names, strict=True)):
            if isinstance(each, Fetch) and each.bits:
                name = names["received"]
                arrived[i] = self.after[name] = self._emit(comm.decode_change, arrived[i], self.held[name], each)
        return arrived

    def _keep_exact(self, site: _Site, i: int, each: Exchange, x: fx.Node, received: fx.Node, last: fx.Node) -> None:
        """Keep what displaced steps read of an exact one.

        Where displaced steps send codes, the value of the step before an exact one is known only if that was exact as
        well; else `before` is one step older. Forecasts do not read it then: a generation begins with an exact step,
        and its second step is unpaced.
        """
        names = site.names[i]
        if "received" in names:
            last = self.held[names["received"]]
            kept = received
            if each.steady is not each:
                kept = self._emit(comm.windowed, received, each, site.rank)
            self.after[names["received"]] = kept
        if "known" in names:
            self.after[names["known"]] = self._emit(comm.sent_rows, x, each, site.rank)
        if "before" in names:
            self.after[names["before"]] = last
        self._remember(names, each, x)

    def _remember(self, names: dict[str, str], each: Exchange, x: fx.Node) -> fx.Node | None:
        """Keep the own value, or the part on which a trend is measured, which is returned."""
        if "sent" in names:
            self.after[names["sent"]] = self._emit(torch.ops.aten.clone.default, x)
        if "last" not in names:
            return None
        now = self._emit(comm.witness, x, each.steady)
        self.after[names["older"]] = self.held[names["last"]]
        self.after[names["last"]] = now
        return now

    def _displaced(self, site: _Site, i: int, each: Exchange, x: fx.Node, received: fx.Node) -> fx.Node:
        """The result of a displaced step."""
        names, steady = site.names[i], each.steady
        if each.fresh == "local":
            return self._emit(comm.local, x, each, site.rank)
        now = self._remember(names, each, x) if each.repeated else None
        if isinstance(each, Moments) and each.needs_sent and each.counts[site.rank] > 0:
            paced = self.paced and "before" in names
            before, pace = (self.held[names["before"]], self.pace) if paced else (received, 0.0)
            result = self._emit(comm.estimate, x, received, self.held[names["sent"]], before, pace, each, site.rank)
        else:
            part = received
            if now is not None and self.paced:
                before, last, older = (self.held[names[what]] for what in ("before", "last", "older"))
                part = self._emit(comm.forecast, received, before, now, last, older, steady)
            result = self._emit(comm.unpack, x, part, steady, site.rank)
        if each.repeated and "before" in names:
            self.after[names["before"]] = received
        return result
