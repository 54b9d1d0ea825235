"""Put a step program together as an ONNX model: pieces of translated operators, and puts and gets between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx
from torch._ops import OpOverload

from ..ir.progress import progress
from ..ir.step import StepProgram
from ..runtime.process_group import padding
from .errors import OnnxError
from .onnx_calls import Call, Form, Lines, Message, Payload, Value, lines_of
from .onnx_pieces import OPSET, Pieces, UntranslatedError, translate

DOMAIN = "fxpass"  #: of `Put` and `Get`
IR_VERSION = 10
TOKEN = ir.TensorType(ir.DataType.BOOL)


@dataclass(frozen=True)
class Names:
    """What the values and modules of a program are called.

    Attributes:
        labels: what the model or the caller calls a placeholder.
        messages: of each channel, the identifier of its message (`x3`).
        modules: class of each module, by path.
    """

    labels: Mapping[str, str]
    messages: Sequence[str]
    modules: Mapping[str, str]


def step_models(
    programs: Sequence[StepProgram], names: Names, initializers: Mapping[str, ir.TensorProtocol]
) -> list[ir.Model]:
    """The ONNX models of step programs of one plan. What they have in common is translated once.

    The inputs of a model are those of the program, and its outputs the program's outputs, the new state, and a token.
    Each `Put` and `Get` takes the token of the one before, which gives them an order.

    Args:
        initializers: placeholders that are constants of the model instead of inputs.

    Raises:
        OnnxError: an operator has no ONNX form.
    """
    forms: dict[Any, Form] = {}
    lines = [lines_of(program, forms) for program in programs]
    try:
        with progress(f"translate {len(forms)} operators to ONNX"):
            pieces = translate(list(forms.values()))
    except UntranslatedError as error:
        calls = (line for each in lines for line in each.lines if isinstance(line, Call))
        node = next(call.node for call in calls if call.form is error.form)
        where = f"{node.name} in {node.meta.get('path') or 'the model itself'}"
        raise OnnxError(f"{operator_name(node)} has no ONNX form: {error} ({where})") from error
    return [
        _Assembly(program, each, pieces, names, initializers).run()
        for program, each in zip(programs, lines, strict=True)
    ]


class _Assembly:
    def __init__(
        self,
        program: StepProgram,
        lines: Lines,
        pieces: Pieces,
        names: Names,
        initializers: Mapping[str, ir.TensorProtocol],
    ) -> None:
        self.program = program
        self.lines = lines
        self.pieces = pieces
        self.names = names
        self.given = initializers
        self.used: Counter[str] = Counter()  #: names
        self.inputs: list[ir.Value] = []
        self.constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.values: dict[Value, ir.Value] = {}
        self.shared: dict[ir.Value, ir.Value] = {}  #: of pieces -> of the model
        self.tables: dict[object, ir.Value] = {}
        self.token: ir.Value | None = None

    def run(self) -> ir.Model:
        for name, value in self.lines.inputs.items():
            self.begin(name, value)
        for line in self.lines.lines:
            if isinstance(line, Call):
                self.call(line)
            else:
                self.message(line)
        return self.model(self.outputs())

    def begin(self, name: str, value: Value) -> None:
        """A placeholder: an input or an initializer."""
        result = self.value(self.unique(self.names.labels.get(name, name)), value)
        self.values[value] = result
        if name in self.given:
            result.const_value = self.given[name]
            self.constants.append(result)
        else:
            self.inputs.append(result)

    def call(self, call: Call) -> None:
        piece = self.pieces.of[call.form]
        known = dict(zip(piece.operands, (self.values[each] for each in call.operands), strict=True))
        for inner, table in zip(piece.tables, call.form.tables, strict=True):
            if table not in self.tables:
                name = self.unique(f"table_{len(self.tables)}")
                self.tables[table] = self.constant(name, ir.tensor(table.array, name=name))
            known[inner] = self.tables[table]
        metadata = scopes(call.node, self.names.modules)
        for node in piece.nodes:
            self.copy(node, known, f"{call.node.name}/{node.name}", metadata)
        for place, (value, inner) in enumerate(zip(call.results, piece.results, strict=True)):
            found = self.values[value] = self.found(inner, known)
            if inner.producer() in piece.nodes:
                found.name = self.unique(call.node.name if len(call.results) == 1 else f"{call.node.name}.{place}")

    def found(self, inner: ir.Value, known: Mapping[ir.Value, ir.Value]) -> ir.Value:
        """The value of the model for one of a piece: its own, or a constant that pieces share."""
        if inner in known:
            return known[inner]
        if inner not in self.shared:
            source = inner.producer()
            if source is not None:
                self.copy(source, self.shared, f"constant/{source.name}", {})
            else:
                assert inner.const_value is not None, f"{inner.name} comes from nowhere"
                self.shared[inner] = self.constant(self.unique(f"constant/{inner.name}"), inner.const_value)
        return self.shared[inner]

    def copy(self, node: ir.Node, known: dict[ir.Value, ir.Value], name: str, metadata: Mapping[str, str]) -> None:
        """Copy a node of a piece; its outputs become known."""
        name = self.unique(name)
        inputs = [None if each is None else self.found(each, known) for each in node.inputs]
        outputs = [
            ir.Value(name=self.unique(f"{name}.{i}" if i else name), shape=each.shape, type=each.type)
            for i, each in enumerate(node.outputs)
        ]
        known.update(zip(node.outputs, outputs, strict=True))
        self.add(node.domain, node.op_type, inputs, node.attributes.values(), outputs, name, metadata, node.overload)

    def message(self, message: Message) -> None:
        """A put or a get."""
        channel = self.program.channels[message.channel]
        identifier = self.names.messages[message.channel]
        attributes = [
            ir.AttrInt64("channel", message.channel),
            ir.AttrStrings("exchanges", [route(identifier, each) for each in message.payloads]),
            ir.AttrStrings("roles", [each.role for each in message.payloads]),
            ir.AttrInt64s("bytes", [each.bytes for each in message.payloads]),
        ]
        name = self.unique(message.node.name)
        token = ir.Value(name=self.unique(f"{name}/token"), shape=ir.Shape([]), type=TOKEN)
        inputs: list[ir.Value | None] = [self.token]
        outputs = [token]
        if message.put:
            inputs += [self.values[each.value] for each in message.payloads]
        else:
            rank = self.program.rank
            attributes += [
                ir.AttrInt64("last", int(message.last)),
                ir.AttrInt64("padding", padding(channel.exchanges, channel.place(rank))),
            ]
            for each in message.payloads:
                result = self.value(self.unique(f"{name}/{route(identifier, each)}"), each.value)
                self.values[each.value] = result
                outputs.append(result)
        metadata = scopes(message.node, self.names.modules)
        self.add(DOMAIN, "Put" if message.put else "Get", inputs, attributes, outputs, name, metadata)
        self.token = token

    def outputs(self) -> list[ir.Value]:
        """The outputs of the model, each a value of its own that some node makes."""
        names = [f"output_{i}" for i in range(len(self.lines.outputs))] + [f"{s.name}.new" for s in self.program.state]
        results: list[ir.Value] = []
        for name, value in zip(names, [*self.lines.outputs, *self.lines.state], strict=True):
            result = self.value(self.unique(name), value)
            self.add("", "Identity", [self.values[value]], (), [result], f"{result.name}/identity", {})
            results.append(result)
        if self.token is not None:
            self.token.name = self.unique("token")
            results.append(self.token)
        return results

    def model(self, outputs: Sequence[ir.Value]) -> ir.Model:
        imports = dict(self.pieces.model.opset_imports) | {"": OPSET, DOMAIN: 1}
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.constants, opset_imports=imports, name="step"
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="fxpass",
            functions=list(self.pieces.model.functions.values()),
        )

    def add(
        self,
        domain: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Iterable[ir.Attr],
        outputs: Sequence[ir.Value],
        name: str,
        metadata: Mapping[str, str],
        overload: str = "",
    ) -> None:
        self.nodes.append(
            ir.Node(
                domain, operator, inputs, list(attributes), overload=overload, outputs=outputs, name=name,
                metadata_props=dict(metadata),
            )
        )  # fmt: skip

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
        self.constants.append(value)
        return value

    def value(self, name: str, like: Value) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(like.shape), type=ir.TensorType(from_torch_dtype(like.dtype)))

    def unique(self, name: str) -> str:
        """This name, with a number if it is taken."""
        self.used[name] += 1
        return name if self.used[name] == 1 else self.unique(f"{name}_{self.used[name]}")


def route(message: str, payload: Payload) -> str:
    """`x3.1 0>2`: value 1 of message 3, from rank 0 to rank 2."""
    return f"{message}.{payload.place} {payload.sender}>{payload.receiver}"


def operator_name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, OpOverload) else node.target.__name__


def scopes(node: fx.Node, modules: Mapping[str, str]) -> dict[str, str]:
    """The modules that a node is in, as torch's exporter writes them: viewers group nodes by them."""
    path, name = node.meta.get("path", ""), operator_name(node)
    parts = path.split(".") if path else []
    paths = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    classes = [modules.get(each, "") for each in paths]
    return {
        "namespace": "/".join([*(f"{p}: {c}" for p, c in zip(paths, classes, strict=True)), f"{node.name}: {name}"]),
        "pkg.torch.onnx.name_scopes": repr([*paths, node.name]),
        "pkg.torch.onnx.class_hierarchy": repr([*classes, name]),
    }
