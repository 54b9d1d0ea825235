"""Write the source of step programs (`ir/code.py`).

Straight-line code has no overhead per node beyond the call, frees each value after its last use, and gives tracebacks
that name the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..ir import comm
from ..ir.code import Place, Segment, StepCode
from ..ir.operators import spec_of
from ..ir.ops import dense
from ..ir.step import StepProgram
from .repeats import cut_at_repeats


def step_code(program: StepProgram, *, check: bool = False, segmented: bool = False) -> StepCode:
    """The source of a step program.

    Args:
        check: also compare the shape of each value with `meta["local_shape"]` (for tests).
        segmented: make a function of what lies between puts and gets, for a compiler.

    Raises:
        ValueError: the graph has a node that is neither placeholder, function call nor output.
    """
    return (_SegmentWriter(program) if segmented else _Writer(program, check)).code()


class _Text:
    """Writes arguments as source; an object that cannot be written gets a name in a table."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {}
        self.named: dict[Any, str] = {}

    def name(self, node: fx.Node) -> str:
        """The variable that holds a node's value."""
        raise NotImplementedError

    def refer(self, value: Any, prefix: str) -> str:
        """A name for an object that cannot be written as source; equal ones have the same."""
        try:
            key = type(value), hash(value), value
        except TypeError:
            key = id(value)
        if key not in self.named:
            name = f"{prefix}{len(self.table)}"
            self.table[name] = value
            self.named[key] = name
        return self.named[key]

    def call_text(self, node: fx.Node, prefix: str) -> str:
        """The call of an operator as source."""
        arguments = [self.text(a) for a in node.args]
        if spec_of(node.target).dense:
            arguments[0] = f"{self.refer(dense, prefix)}({arguments[0]})"
        arguments += [f"{key}={self.text(value)}" for key, value in node.kwargs.items()]
        return f"{self.refer(node.target, prefix)}({', '.join(arguments)})"

    def text(self, value: Any) -> str:
        """An argument as source."""
        if isinstance(value, fx.Node):
            return self.name(value)
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


class _Local(_Text):
    """Writes the arguments of a segment."""

    def __init__(self, names: dict[fx.Node, str]) -> None:
        super().__init__()
        self.names = names

    def refer(self, value: Any, prefix: str = "c") -> str:
        return super().refer(value, "c")

    def name(self, node: fx.Node) -> str:
        return self.names[node]


class _Writer(_Text):
    """Writes the source of a step program."""

    def __init__(self, program: StepProgram, check: bool) -> None:
        super().__init__()
        self.program = program
        self.graph = program.graph
        self.check = check
        self.source: list[str] = []
        self.lines: list[str] = []
        self.number = {node: i for i, node in enumerate(self.graph.nodes)}
        self.dying = last_uses(self.graph)
        self.segments: dict[Segment, str] = {}
        self.places: dict[int, Place] = {}

    def code(self) -> StepCode:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.line("def run(compiled, values):", "the entry")
        names = "".join(f"v{self.number[node]}, " for node in placeholders)
        self.line(f"    {names}= values" if names else "    pass", "the inputs")
        self.line("    del values", "the inputs")
        for node in self.graph.nodes:
            label = f"{node.name} ({node.meta.get('path', '')})"
            name = f"v{self.number[node]}"
            if node.op == "placeholder":
                continue
            if node.op == "output" or node.target in (comm.put, comm.get):
                self.flush(node)
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
                if self.program.channels[channel].closing:
                    self.keep(node)
                label = f"put of {self.program.channels[channel]}"
                self.line(f'    {name} = yield "put", {channel}, {self.text(packed)}', label)
            elif node.target is comm.get:
                (channel,) = node.args
                label = f"get of {self.program.channels[channel]}"
                self.line(f'    box = yield "get", {channel}, None', label)
                self.line(f"    {name} = tuple(box); box.clear()", label)
            else:
                self.call(node, name, label)
                continue
            self.free(self.dying.get(node, ()), label)
        names = tuple(str(node.target) for node in placeholders)
        source = "\n".join(self.source) + "\n"
        program = self.program
        segments = {name: segment for segment, name in self.segments.items()}
        lines, received = tuple(self.lines), program.received()
        data = program.rank, program.mode, names, source, self.table, lines, received
        return StepCode(*data, segments, self.places)

    def keep(self, closing: fx.Node) -> None:
        """Write what happens before the closing message is put."""
        (output,) = self.graph.find_nodes(op="output")
        outputs, state = output.args[0]
        have = [value if self.number[value] < self.number[closing] else None for value in outputs]
        self.line(f'    yield "keep", -1, ({self.text(have)}, {self.text(list(state))})', "the new state")

    def call(self, node: fx.Node, name: str, label: str) -> None:
        self.line(f"    {name} = {self.call_text(node, 'f')}", label)
        if self.check and "local_shape" in node.meta:
            checker = self.refer(check_shape, "f")
            shape = self.text(tuple(node.meta["local_shape"]))
            self.line(f"    {checker}({name}, {shape}, {label!r})", label)
        self.free(self.dying.get(node, ()), label)

    def free(self, dead: Sequence[fx.Node], label: str) -> None:
        if dead:
            self.line("    del " + ", ".join(f"v{self.number[node]}" for node in dead), label)

    def flush(self, node: fx.Node) -> None:
        """Called before a put, a get and the output."""

    def name(self, node: fx.Node) -> str:
        return f"v{self.number[node]}"

    def line(self, text: str, label: str) -> None:
        self.source.append(text)
        self.lines.append(label)


class _SegmentWriter(_Writer):
    """Writes what lies between puts and gets as functions, equal ones once."""

    def __init__(self, program: StepProgram) -> None:
        super().__init__(program, check=False)
        self.waiting: list[fx.Node] = []  #: the nodes of the segment being written
        self.buffers = {node for node in self.graph.nodes if node.target is comm.get}

    def call(self, node: fx.Node, name: str, label: str) -> None:
        if node.args and node.args[0] in self.buffers:  # one of the buffers of a get
            super().call(node, name, label)
        else:
            self.waiting.append(node)

    def flush(self, node: fx.Node) -> None:
        nodes, self.waiting = self.waiting, []
        for piece in cut_at_repeats(nodes, _form):
            self.write(piece)

    def write(self, nodes: Sequence[fx.Node]) -> None:
        """Write the call of a segment."""
        if all(each.target is comm.pack or spec_of(each.target).free for each in nodes):  # views: nothing to compile
            for each in nodes:
                super().call(each, self.name(each), f"{each.name} ({each.meta.get('path', '')})")
            return
        inputs, outputs = _ends(nodes)
        segment = segment_of(nodes, inputs, outputs)
        name = self.segments.setdefault(segment, f"s{len(self.segments)}")
        label = f"{name}, from {nodes[0].name} ({nodes[0].meta.get('path', '')}) to {nodes[-1].name}"
        self.line(f"    box = [{', '.join(f'v{self.number[each]}' for each in inputs)}]", label)
        dead = [each for last in nodes for each in self.dying.get(last, ())]
        inside = set(nodes)
        self.free([each for each in dead if each not in inside], label)
        results = "".join(f"v{self.number[each]}, " for each in outputs)
        self.line(f"    {results or '_'} = compiled[{name!r}](box)", label)
        self.places[len(self.lines)] = Place(
            name, tuple(f"{each.name} ({each.meta.get('path', '')})" for each in nodes), _shapes(inputs)
        )


def _ends(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The values that a run of operators reads from outside, and those that are read outside of it."""
    inside = set(nodes)
    inputs = dict.fromkeys(used for each in nodes for used in each.all_input_nodes if used not in inside)
    return list(inputs), [each for each in nodes if any(user not in inside for user in each.users)]


def _shapes(inputs: Sequence[fx.Node]) -> tuple[Any, ...]:
    return tuple((each.meta.get("local_shape"), each.meta.get("dtype")) for each in inputs)


def _form(nodes: Sequence[fx.Node]) -> tuple[Segment, tuple[Any, ...]]:
    """Equal for runs of operators that can share a compiled segment."""
    inputs, outputs = _ends(nodes)
    return segment_of(nodes, inputs, outputs), _shapes(inputs)


def segment_of(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Segment:
    writer = _Local({node: f"x{i}" for i, node in enumerate(inputs)})
    lines = ["def segment(inputs):"]  # one line for the inputs, then one for each node
    lines.append(f"    {''.join(f'{name}, ' for name in writer.names.values())}= inputs" if inputs else "    pass")
    for node in nodes:
        called = writer.call_text(node, "c")
        writer.names[node] = f"y{len(writer.names)}"
        lines.append(f"    {writer.names[node]} = {called}")
    lines.append(f"    return {writer.text(tuple(outputs))}")
    return Segment("\n".join(lines) + "\n", tuple(writer.table.values()))


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
