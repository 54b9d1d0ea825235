"""lower_comm: from a rank's scheduled graph to its step programs, in which exchanges are ordinary operators.

    ops.exchange, ops.wait  ->  pack, put, get, unpack; of displaced steps: witness, forecast, estimate, codes

A put stands where the launch stood, a get where the wait stood. What a displaced step reads of earlier steps is state,
or the message of the last step, which is still in its channel. An exchange node has one channel; where displaced steps
send something else than exact ones (windows, codes) it has two.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir import comm, ops
from ..ir.comm import received_shape
from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.merge import Moments
from ..ir.nodes import append, append_copy
from ..ir.program import specialize
from ..ir.step import MODES, ChannelSpec, Mode, StateSpec, StepProgram

PACE = "pace"  #: the placeholder of the step's length in units of the last one's, 0-dim float64
STEPS = "steps"  #: the state that counts the steps of this context so far, 0-dim int64


def lower_comm(graph: fx.Graph, rank: int) -> dict[Mode, StepProgram]:
    """The step programs of rank `rank`. A mode that equals another is the same object.

    Args:
        graph: the scheduled graph for all ranks.
    """
    local = specialize(graph, rank)
    sites = _sites(local, rank)
    channels = tuple(channel for site in sites.values() for channel in site.channels)
    number = {channel.name: i for i, channel in enumerate(channels)}
    state = (StateSpec(STEPS, (), torch.int64), *(spec for site in sites.values() for spec in site.state))
    modes: tuple[Mode, ...] = MODES if any(site.stale for site in sites.values()) else ("exact",)
    programs = {
        mode: StepProgram(rank, mode, _Lowering(local, rank, mode, sites, number, state).run(), channels, state)
        for mode in modes
    }
    if "first" in programs and all(site.wire is site.now for site in sites.values()):
        programs["first"] = programs["steady"]
    return programs


@dataclass(frozen=True)
class _Site:
    """An exchange node: its channels and its state on one rank."""

    rank: int
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


def _sites(graph: fx.Graph, rank: int) -> dict[fx.Node, _Site]:
    sites: dict[fx.Node, _Site] = {}
    for node in graph.nodes:
        if node.target is ops.exchange:
            sites[node] = _site(node, rank, len(sites))
    return sites


def _site(node: fx.Node, rank: int, index: int) -> _Site:
    values, exchanges = node.args
    wires = tuple(each.wire for each in exchanges)  # type: ignore[union-attr]
    one = wires == exchanges
    stale = exchanges[0].fresh != "sync" and exchanges[0].repeated  # type: ignore[union-attr]
    now = _channel(node.name, exchanges, late=stale and one)  # type: ignore[arg-type]
    wire = now if one else _channel(f"{node.name}.displaced", wires, late=True)
    state: list[StateSpec] = []
    names: list[dict[str, str]] = []
    for i, (x, each) in enumerate(zip(values, exchanges, strict=True)):  # type: ignore[arg-type]
        kept = _state_shapes(each, rank, x.meta["local_shape"], one)
        names.append({what: f"state_{index}_{i}_{what}" for what in kept})
        state += [StateSpec(names[-1][what], shape, each.dtype) for what, shape in kept.items()]
    return _Site(rank, exchanges, now, wire, tuple(state), tuple(names))  # type: ignore[arg-type]


def _channel(name: str, exchanges: tuple[Exchange, ...], late: bool) -> ChannelSpec | None:
    silent = not any(each.messages for each in exchanges)
    return None if silent else ChannelSpec(name, exchanges, late)


def _state_shapes(exchange: Exchange, rank: int, own: tuple[int, ...], one: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of what a rank keeps of an exchange beside the messages in its channel.

    Args:
        one: whether exact and displaced steps send the same, so that the channel holds what an exact step received.
    """
    kept: dict[str, tuple[int, ...]] = {}
    if exchange.fresh in ("sync", "local"):
        return kept
    there = received_shape(exchange.steady, rank)
    if exchange.fresh == "frozen" or not one:
        kept["received"] = there
    if isinstance(exchange, Fetch) and exchange.bits:
        shape = exchange.wire.have[rank]
        kept["known"] = (*own[: exchange.dim], len(shape), *own[exchange.dim + 1 :])
    if exchange.needs_sent:
        kept["sent"] = own
    if exchange.forecast:
        kept["before"] = there
        if not exchange.needs_sent:
            kept["last"] = kept["older"] = _witness_shape(exchange.steady, own)
    return kept


def _witness_shape(exchange: Exchange, own: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(exchange.witness(torch.empty(own, device="meta")).shape)


class _Lowering:
    """Writes the program of one mode."""

    def __init__(
        self,
        source: fx.Graph,
        rank: int,
        mode: Mode,
        sites: dict[fx.Node, _Site],
        channels: dict[str, int],
        state: Iterable[StateSpec],
    ) -> None:
        self.source = source
        self.rank = rank
        self.mode = mode
        self.sites = sites
        self.channels = channels
        self.state = tuple(state)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.held: dict[str, fx.Node] = {}  #: placeholders of the state
        self.after: dict[str, fx.Node] = {}  #: new values of the state
        self.node: fx.Node | None = None  #: being lowered

    def run(self) -> fx.Graph:
        for node in self.source.nodes:
            self.node = node
            if node.op == "placeholder":
                self.env[node] = append_copy(self.graph, node)
                continue
            if not self.held:
                self._begin()
            if node.op == "output":
                outputs = [self.env[value] for value in node.args[0]]
                self.graph.output((outputs, [self.after.get(s.name, self.held[s.name]) for s in self.state]))
            elif node.target is ops.exchange:
                self._launch(node)
            elif node.target is ops.wait:
                self.env[node] = self._wait(node.args[0])
            elif node.target is operator.getitem and isinstance(self.env[node.args[0]], list):
                self.env[node] = self.env[node.args[0]][node.args[1]]
            else:
                self.env[node] = append_copy(self.graph, node, self.env.__getitem__)
        self.graph.lint()
        return self.graph

    def _begin(self) -> None:
        """The placeholders beside those of the model, and what every step does first."""
        meta = {"shape": (), "local_shape": (), "dtype": torch.float64}
        self.pace = self._placeholder(PACE, meta)
        for spec in self.state:
            meta = {"shape": spec.shape, "local_shape": spec.shape, "dtype": spec.dtype}
            self.held[spec.name] = self._placeholder(spec.name, meta)
        steps = self.held[STEPS]
        self.after[STEPS] = self._emit(torch.ops.aten.add.Tensor, steps, 1)
        if self.mode != "exact":
            paced = self._emit(torch.ops.aten.ne.Scalar, self.pace, 0)
            twice = self._emit(torch.ops.aten.ge.Scalar, steps, 2)
            #: whether two earlier steps exist, and how long this one is in units of the last
            self.ready = self._emit(torch.ops.aten.logical_and.default, paced, twice)

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
            self._put(site.now, site.exchanges, values)
        elif site.exchanges[0].repeated:
            wires = [each.wire for each in site.exchanges]
            self._put(site.wire, wires, [self._outgoing(site, i, x) for i, x in enumerate(values)])

    def _put(self, channel: ChannelSpec | None, exchanges: Iterable[Exchange], values: list[fx.Node]) -> None:
        if channel is not None:
            packed = [self._emit(comm.pack, x, each, self.rank) for x, each in zip(values, exchanges, strict=True)]
            self._emit(comm.put, tuple(packed), self.channels[channel.name])

    def _outgoing(self, site: _Site, i: int, x: fx.Node) -> fx.Node:
        """What a displaced step sends of `x`."""
        name = site.names[i].get("known")
        if name is None:
            return x
        codes = self._emit(comm.encode_change, x, self.held[name], site.exchanges[i], self.rank)
        self.after[name] = self._emit(operator.getitem, codes, 1)
        return self._emit(operator.getitem, codes, 0)

    def _wait(self, launch: fx.Node) -> list[fx.Node]:
        """The results of an exchange node, and what is kept of it."""
        site = self.sites[launch]
        values = [self.env[value] for value in launch.args[0]]  # type: ignore[union-attr]
        if self.mode == "exact" or not site.stale:
            received = self._get(site.now, site, values, 0)
            if site.stale:
                late = self._get(site.now, site, values, 1) if self._reads_last(site) else received
                for i, each in enumerate(site.exchanges):
                    self._keep_exact(site, i, each, values[i], received[i], late[i])
            return [
                self._emit(comm.unpack, x, part, each, self.rank)
                for x, part, each in zip(values, received, site.exchanges, strict=True)
            ]
        received = self._last(site, values)
        return [self._displaced(site, i, each, values[i], received[i]) for i, each in enumerate(site.exchanges)]

    def _reads_last(self, site: _Site) -> bool:
        """Whether an exact step keeps the last step's message, which its channel holds, for forecasts."""
        return any("before" in names and "received" not in names for names in site.names)

    def _get(self, channel: ChannelSpec | None, site: _Site, values: list[fx.Node], age: int) -> list[fx.Node]:
        if channel is None:
            empty = [received_shape(each, self.rank) for each in site.exchanges]
            return [
                self._emit(torch.ops.aten.new_empty.default, x, list(shape))
                for x, shape in zip(values, empty, strict=True)
            ]
        buffers = self._emit(comm.get, self.channels[channel.name], age)
        return [self._emit(operator.getitem, buffers, i) for i in range(len(channel.exchanges))]

    def _last(self, site: _Site, values: list[fx.Node]) -> list[fx.Node]:
        """What the others sent at the last step, or at the last exact one."""
        names = [each.get("received") for each in site.names]
        held = [None if name is None else self.held[name] for name in names]
        if site.exchanges[0].fresh == "local":
            return values  # not read
        if all(part is not None for part in held) and (self.mode == "first" or site.exchanges[0].fresh == "frozen"):
            return held  # type: ignore[return-value]
        arrived = self._get(site.wire, site, values, 1)
        for i, (each, name, part) in enumerate(zip(site.exchanges, names, held, strict=True)):
            if isinstance(each, Fetch) and each.bits:
                assert name is not None
                arrived[i] = self.after[name] = self._emit(comm.decode_change, arrived[i], part, each)
        return arrived

    def _keep_exact(self, site: _Site, i: int, each: Exchange, x: fx.Node, received: fx.Node, last: fx.Node) -> None:
        """Keep what displaced steps read of an exact one.

        Where displaced steps send codes, the value of the step before an exact one is known only if that was exact as
        well; else `before` is one step older. Forecasts do not read it then: a generation begins with an exact step,
        and `pace` is 0 at its second step.
        """
        names = site.names[i]
        if "received" in names:
            last = self.held[names["received"]]
            kept = received
            if each.steady is not each:
                kept = self._emit(comm.windowed, received, each, self.rank)
            self.after[names["received"]] = kept
        if "known" in names:
            self.after[names["known"]] = self._emit(comm.sent_rows, x, each, self.rank)
        if "before" in names:
            self.after[names["before"]] = last
        self._remember(names, each, x)

    def _remember(self, names: dict[str, str], each: Exchange, x: fx.Node) -> fx.Node | None:
        """Keep the own value, or the part on which a trend is measured, which is returned."""
        if "sent" in names:
            self.after[names["sent"]] = x
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
            return self._emit(comm.local, x, each, self.rank)
        estimated = isinstance(each, Moments) and each.needs_sent and each.counts[self.rank] > 0
        if estimated:
            sent = self.held[names["sent"]]
            before = self.held[names["before"]] if "before" in names else received
            args = (x, received, sent, before, self.ready, self.pace)
            result = self._emit(comm.estimate, *args, each, self.rank)
        else:
            part = received
            if "last" in names:
                now = self._emit(comm.witness, x, steady)
                held = [self.held[names[what]] for what in ("before", "last", "older")]
                before, last, older = held
                part = self._emit(comm.forecast, received, before, now, last, older, self.ready, steady)
            result = self._emit(comm.unpack, x, part, steady, self.rank)
        if each.repeated:
            if "before" in names:
                self.after[names["before"]] = received
            self._remember(names, each, x)
        return result
