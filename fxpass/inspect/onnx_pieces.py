"""Translate operators to ONNX by torch's exporter, each `Form` once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .onnx_bits import BITS
from .onnx_calls import Form

OPSET = 23


class UntranslatedError(NotImplementedError):
    """An operator has no ONNX form; `form` says which, and the message why."""

    def __init__(self, form: Form, cause: BaseException) -> None:
        super().__init__(_first_line(cause))
        self.form = form


@dataclass(frozen=True, eq=False)
class Piece:
    """The ONNX nodes of a form that depend on its operands."""

    operands: tuple[ir.Value, ...]
    tables: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    results: tuple[ir.Value, ...]


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of forms, and the ONNX model that they are parts of. What no operand leads to is a constant."""

    of: dict[Form, Piece]
    model: ir.Model


def translate(forms: Sequence[Form]) -> Pieces:
    """The pieces of `forms`.

    Raises:
        UntranslatedError: one of them has no ONNX form.
    """
    try:
        model = _exported(forms)
    except Exception as error:
        raise _culprit(forms, error) from error
    supply, results = iter(model.graph.inputs), iter(model.graph.outputs)
    ends = [
        (
            tuple(islice(supply, len(f.operands))),
            tuple(islice(supply, len(f.tables))),
            tuple(islice(results, _count(f))),
        )
        for f in forms
    ]
    assert [*supply, *results] == [], "the exporter added inputs or outputs"
    owner = {value: i for i, (operands, tables, _) in enumerate(ends) for value in (*operands, *tables)}
    nodes: list[list[ir.Node]] = [[] for _ in forms]
    for node in model.graph:
        owners = {owner[value] for value in _read(node) if value in owner}
        if owners and _subgraphs(node):
            raise UntranslatedError(forms[min(owners)], NotImplementedError(f"it is {node.op_type} with a subgraph"))
        assert len(owners) <= 1, f"{node.op_type} joins two operators"
        for i in owners:
            nodes[i].append(node)
            owner.update(dict.fromkeys(node.outputs, i))
    pieces = {
        form: Piece(operands, tables, tuple(some), outputs)
        for form, some, (operands, tables, outputs) in zip(forms, nodes, ends, strict=True)
    }
    return Pieces(pieces, model)


class _Forms(nn.Module):
    """Calls every form on operands of its own."""

    def __init__(self, forms: Sequence[Form]) -> None:
        super().__init__()
        self.forms = list(forms)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        supply = iter(values)
        found: list[Tensor] = []
        for form in self.forms:
            operands, tables = (list(islice(supply, len(some))) for some in (form.operands, form.tables))
            results = form.run(operands, tables)
            found += [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor)]
        return tuple(found)


def _exported(forms: Sequence[Form]) -> ir.Model:
    with FakeTensorMode(), torch.no_grad():
        values: list[Tensor] = []
        for form in forms:
            values += [torch.empty(each.shape, dtype=each.dtype) for each in form.operands]
            values += [torch.from_numpy(table.array.copy()) for table in form.tables]
    with torch.no_grad(), _quiet():
        program = torch.export.export(_Forms(forms), tuple(values), strict=False)
        if any(node.target in BITS for node in program.graph.nodes):
            program = program.run_decompositions(BITS)
        for target, change in _CHANGES.items():
            for node in program.graph.find_nodes(op="call_function", target=target):
                change(node)
        written = getattr(program.graph_signature, "user_inputs_to_mutate", {})
        assert not written, f"operators write to their operands: {written}"
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        assert exported is not None
        fold_constants(exported.model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(exported.model)
        common.DeduplicateInitializersPass()(exported.model)
    return exported.model


def _same_kind(clamp: fx.Node) -> None:
    """Make the bounds of a floating-point tensor floats: the exporter makes tensors of integers, and fails on a mix."""
    x, *bounds = clamp.args
    if x.meta["val"].is_floating_point():
        clamp.args = (x, *(each if each is None else float(each) for each in bounds))  # type: ignore[arg-type]


def _in_usual_order(empty: fx.Node) -> None:
    """Forget the order in memory, which ONNX does not know."""
    size, _ = empty.args
    empty.target, empty.args = torch.ops.aten.zeros.default, (size,)


_CHANGES: dict[Any, Callable[[fx.Node], None]] = {  #: what torch's exporter does not translate as it is
    torch.ops.aten.clamp.default: _same_kind,
    torch.ops.aten.empty_permuted.default: _in_usual_order,
}


def _culprit(forms: Sequence[Form], error: BaseException) -> UntranslatedError:
    """The error of the first form that cannot be translated, found by halving."""
    while len(forms) > 1:
        half = forms[: len(forms) // 2]
        try:
            _exported(half)
        except Exception as earlier:
            forms, error = half, earlier
        else:
            forms = forms[len(half) :]
    return UntranslatedError(forms[0], error)


def _count(form: Form) -> int:
    return sum(each is not None for each in pytree.tree_leaves(form.results))


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node and its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for each in _subgraphs(node):
        for inner in each:
            yield from _read(inner)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node that runs one of them (If) or repeats one (Loop)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line: of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporter and its passes on what they leave out."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnx_ir", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
