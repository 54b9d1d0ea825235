"""Compile one rank's graph to a Python generator function that yields at each exchange.

    v812 = f3(v811, v4, None, (1, 1))  # conv2d_7 (mid.resnets.0.conv1)
    del v811
    yield "launch", s2, [v812]  # exchange_2
    v815 = f7(v814)  # silu_9, which needs no result of the exchange
    box = [v812]; del v812; yield "wait", s2, box  # wait_2
    v816 = tuple(box); box.clear()

Straight-line code has no overhead per node beyond the call, frees each value after its last use, and gives tracebacks
that name the node. A `RankProgram` is plain data and can be sent to another process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from torch import Tensor, fx

from ..ir import ops
from ..ir.exchange import Exchange


@dataclass(frozen=True, eq=False)
class Site:
    """An exchange node, which all ranks' programs have at the same place."""

    index: int
    name: str
    path: str  #: the module that it belongs to
    exchanges: tuple[Exchange, ...]

    @property
    def stale(self) -> bool:
        """Whether a displaced step uses values sent at an earlier step."""
        return self.exchanges[0].fresh != "sync"

    @property
    def repeated(self) -> bool:
        """Whether displaced steps send."""
        return self.exchanges[0].repeated

    @property
    def forecast(self) -> bool:
        """Whether a displaced step extrapolates received values."""
        return any(each.forecast for each in self.exchanges)

    @property
    def coded(self) -> bool:
        """Whether displaced steps send coded changes."""
        return self.wire.exchanges != self.steady.exchanges

    @cached_property
    def steady(self) -> Site:
        """This site at displaced steps; another one only if attention has windows."""
        return self._with(tuple(each.steady for each in self.exchanges))

    @cached_property
    def wire(self) -> Site:
        """The site that describes displaced steps' messages; another one only with windows or codes."""
        return self._with(tuple(each.wire for each in self.exchanges))

    def _with(self, exchanges: tuple[Exchange, ...]) -> Site:
        return self if exchanges == self.exchanges else replace(self, exchanges=exchanges)


Act = Literal["launch", "wait"]
#: Yields (act, site, box); `box` holds the values. At a wait, the driver replaces them by the results before it resumes
#: the program. (A list, so that neither side keeps a value alive that the other no longer needs.)
Run = Generator[tuple[Act, Site, list[Tensor]], None, list[Tensor]]


class Transport(Protocol):
    """Performs the exchanges of one rank."""

    def launch(self, site: Site, values: list[Tensor]) -> None: ...
    def wait(self, site: Site, values: list[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True, eq=False)
class RankProgram:
    """One rank's program. It is called with one value per placeholder of the graph."""

    rank: int
    placeholders: tuple[str, ...]
    source: str
    table: dict[str, Any]  #: the globals of the source: operators, exchange sites, static arguments
    lines: tuple[str, ...]  #: the node of each line of the source

    @staticmethod
    def of(graph: fx.Graph, rank: int, *, check: bool = False) -> RankProgram:
        """Compile the specialised graph of `rank`.

        Args:
            check: also compare the shape of each value with `meta["local_shape"]` (for tests).

        Raises:
            ValueError: the graph has a node that is neither placeholder, function call nor output.
        """
        return _Writer(graph, check).program(rank)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The exchanges, in order."""
        return tuple(value for value in self.table.values() if isinstance(value, Site))

    def run(self, values: Sequence[Tensor]) -> Run:
        """Run on one value per placeholder; the generator returns the flat outputs.

        An operator's exception gets a note with the node, module and rank.
        """
        try:
            return (yield from self._function(values))
        except Exception as error:
            error.add_note(f"in fxpass rank {self.rank}, {self._where(error)}")
            raise

    @cached_property
    def _function(self) -> Callable[[Sequence[Tensor]], Run]:
        filename = f"<fxpass rank {self.rank} {id(self):x}>"
        namespace = dict(self.table)
        exec(compile(self.source, filename, "exec"), namespace)
        return namespace["run"]

    def _where(self, error: Exception) -> str:
        code = self._function.__code__
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is code:
                return f"at {self.lines[trace.tb_lineno - 1]}"
            trace = trace.tb_next
        return "outside its graph"


def drive(run: Run, transport: Transport) -> list[Tensor]:
    """Run one rank to its end."""
    try:
        while True:
            act, site, box = next(run)
            if act == "launch":
                transport.launch(site, box)
            else:
                box[:] = transport.wait(site, take_all(box))
    except StopIteration as stop:
        return stop.value


def take_all(box: list[Tensor]) -> list[Tensor]:
    """Empty the box, and return its values."""
    values = box[:]
    box.clear()
    return values


class _Writer:
    """Writes the source of a graph."""

    def __init__(self, graph: fx.Graph, check: bool) -> None:
        self.graph = graph
        self.check = check
        self.table: dict[str, Any] = {}
        self.named: dict[int, str] = {}  # id of an object in the table -> its name
        self.code: list[str] = []
        self.lines: list[str] = []
        self.sites: dict[fx.Node, str] = {}
        self.number = {node: i for i, node in enumerate(graph.nodes)}
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self.dying.setdefault(node, []).append(used)
        self.unused = {node for node in graph.nodes if node not in seen}

    def program(self, rank: int) -> RankProgram:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.line("def run(values):", "the entry")
        names = "".join(f"v{self.number[node]}, " for node in placeholders)
        self.line(f"    {names}= values" if names else "    pass", "the inputs")
        self.line("    del values", "the inputs")
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            label = f"{node.name} ({node.meta.get('path', '')})"
            name = f"v{self.number[node]}"
            freed = [f"v{self.number[dead]}" for dead in self.dying.get(node, ())]
            if node.op == "output":
                # the yield makes it a generator function even without exchanges
                self.line(f"    return {self.text(list(node.args[0]))}", label)
                self.line("    yield", label)
            elif node.op != "call_function":
                raise ValueError(f"a rank's graph has a {node.op} node: {node.format_node()}")
            elif node.target is ops.exchange:
                values, exchanges = node.args
                site = self.refer(Site(len(self.sites), node.name, node.meta.get("path", ""), tuple(exchanges)), "s")
                self.line(f'    yield "launch", {site}, {self.text(list(values))}', label)
                self.sites[node] = site
            elif node.target is ops.wait:
                launch, values = node.args
                self.line(f"    box = {self.text(list(values))}", label)
                freed = [name for name in freed if name != f"v{self.number[launch]}"]
                if freed:
                    self.line("    del " + ", ".join(freed), label)
                self.line(f'    yield "wait", {self.sites[launch]}, box', label)
                self.line(f"    {name} = tuple(box); box.clear()", label)
            else:
                arguments = [self.text(a) for a in node.args]
                arguments += [f"{key}={self.text(value)}" for key, value in node.kwargs.items()]
                self.line(f"    {name} = {self.refer(node.target, 'f')}({', '.join(arguments)})", label)
                if self.check and "local_shape" in node.meta:
                    checker = self.refer(check_shape, "f")
                    shape = self.text(tuple(node.meta["local_shape"]))
                    self.line(f"    {checker}({name}, {shape}, {label!r})", label)
                if node in self.unused:
                    freed.append(name)
                if freed:
                    self.line("    del " + ", ".join(freed), label)
        placeholder_names = tuple(str(node.target) for node in placeholders)
        return RankProgram(rank, placeholder_names, "\n".join(self.code) + "\n", self.table, tuple(self.lines))

    def line(self, text: str, label: str) -> None:
        self.code.append(text)
        self.lines.append(label)

    def refer(self, value: Any, prefix: str) -> str:
        """A name for an object that cannot be written as source."""
        if id(value) not in self.named:
            name = f"{prefix}{len(self.table)}"
            self.table[name] = value
            self.named[id(value)] = name
        return self.named[id(value)]

    def text(self, value: Any) -> str:
        """An argument as source."""
        if isinstance(value, fx.Node):
            return f"v{self.number[value]}"
        if value is None or value is True or value is False or type(value) is int:
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if type(value) is tuple:
            return "(" + "".join(self.text(item) + ", " for item in value) + ")"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.text, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self.text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        return self.refer(value, "k")


def check_shape(value: Any, shape: tuple[int, ...], label: str) -> None:
    """Raises `AssertionError` if a local value does not have the shape that its layout implies."""
    if isinstance(value, Tensor) and tuple(value.shape) != shape:
        raise AssertionError(f"{label} has shape {tuple(value.shape)}, its layout says {shape}")
