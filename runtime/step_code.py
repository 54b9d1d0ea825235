"""Compile a step program to a Python generator function that yields at each put and get.

    v811 = f3(v810, v4, None, (1, 1))  # conv2d_7 (mid.resnets.0.conv1)
    v812 = f5(v811, k9, 0)  # pack of exchange_2
    box = yield "get", 2, None  # the message of the last step
    v813 = tuple(box); box.clear()
    yield "put", 2, (v812,)
    del v812
    v814 = f7(v811, v813, k9, 0)  # unpack of exchange_2

Straight-line code has no overhead per node beyond the call, frees each value after its last use, and gives tracebacks
that name the node. A `StepCode` is plain data and can be sent to another process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, fx

from ..ir import comm
from ..ir.step import Mode, StepProgram
from .channels import Channel

Act = Literal["put", "get"]
#: Yields (act, channel, what is put: of each exchange, by destination), is sent the receive buffers at a get, and
#: returns (outputs, new state). It empties the list of buffers, so that nobody keeps alive what it has used.
Run = Generator[tuple[Act, int, Any], Any, tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True, eq=False)
class StepCode:
    """One rank's step of one mode. It is called with one value per placeholder of the graph."""

    rank: int
    mode: Mode
    placeholders: tuple[str, ...]
    source: str
    table: dict[str, Any]  #: the globals of the source: operators, exchanges, other static arguments
    lines: tuple[str, ...]  #: the node of each line of the source
    received: dict[str, int]  #: bytes that the rank receives, by role

    @staticmethod
    def of(program: StepProgram, *, check: bool = False) -> StepCode:
        """Compile a step program.

        Args:
            check: also compare the shape of each value with `meta["local_shape"]` (for tests).

        Raises:
            ValueError: the graph has a node that is neither placeholder, function call nor output.
        """
        return _Writer(program, check).code()

    def run(self, values: Sequence[Tensor]) -> Run:
        """Run on one value per placeholder.

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


def drive(run: Run, channels: Sequence[Channel]) -> tuple[list[Tensor], list[Tensor]]:
    """Run one rank's step to its end; returns (outputs, new state)."""
    received: list[Tensor] | None = None
    try:
        while True:
            act, channel, packed = run.send(received)
            received = None
            if act == "put":
                channels[channel].put(packed)
            else:
                received = channels[channel].get()
            packed = None
    except StopIteration as stop:
        return stop.value


class _Writer:
    """Writes the source of a step program."""

    def __init__(self, program: StepProgram, check: bool) -> None:
        self.program = program
        self.graph = program.graph
        self.check = check
        self.table: dict[str, Any] = {}
        self.named: dict[int, str] = {}  # id of an object in the table -> its name
        self.source: list[str] = []
        self.lines: list[str] = []
        self.number = {node: i for i, node in enumerate(self.graph.nodes)}
        self.dying = last_uses(self.graph)

    def code(self) -> StepCode:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.line("def run(values):", "the entry")
        names = "".join(f"v{self.number[node]}, " for node in placeholders)
        self.line(f"    {names}= values" if names else "    pass", "the inputs")
        self.line("    del values", "the inputs")
        for node in self.graph.nodes:
            label = f"{node.name} ({node.meta.get('path', '')})"
            name = f"v{self.number[node]}"
            if node.op == "placeholder":
                continue
            if node.op == "output":
                # the yield makes it a generator function even without exchanges
                outputs, state = node.args[0]
                self.line(f"    return {self.text(list(outputs))}, {self.text(list(state))}", label)
                self.line("    yield", label)
                break
            if node.op != "call_function":
                raise ValueError(f"a step program has a {node.op} node: {node.format_node()}")
            if node.target is comm.put:
                packed, channel = node.args
                label = f"put of {self.program.channels[channel]}"
                self.line(f'    {name} = yield "put", {channel}, {self.text(packed)}', label)
            elif node.target is comm.get:
                (channel,) = node.args
                label = f"get of {self.program.channels[channel]}"
                self.line(f'    box = yield "get", {channel}, None', label)
                self.line(f"    {name} = tuple(box); box.clear()", label)
            else:
                self.call(node, name, label)
            freed = [f"v{self.number[dead]}" for dead in self.dying.get(node, ())]
            if freed:
                self.line("    del " + ", ".join(freed), label)
        names = tuple(str(node.target) for node in placeholders)
        source = "\n".join(self.source) + "\n"
        program = self.program
        return StepCode(program.rank, program.mode, names, source, self.table, tuple(self.lines), program.received())

    def call(self, node: fx.Node, name: str, label: str) -> None:
        arguments = [self.text(a) for a in node.args]
        arguments += [f"{key}={self.text(value)}" for key, value in node.kwargs.items()]
        self.line(f"    {name} = {self.refer(node.target, 'f')}({', '.join(arguments)})", label)
        if self.check and "local_shape" in node.meta:
            checker = self.refer(check_shape, "f")
            shape = self.text(tuple(node.meta["local_shape"]))
            self.line(f"    {checker}({name}, {shape}, {label!r})", label)

    def line(self, text: str, label: str) -> None:
        self.source.append(text)
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


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The values that no node after each node reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        dead.setdefault(user, []).append(node)
    return dead


def check_shape(value: Any, shape: tuple[int, ...], label: str) -> None:
    """Raises `AssertionError` if a local value does not have the shape that its layout implies."""
    if isinstance(value, Tensor) and tuple(value.shape) != shape:
        raise AssertionError(f"{label} has shape {tuple(value.shape)}, its layout says {shape}")
