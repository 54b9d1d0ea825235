"""Compare two recorded graphs with each other, and a program with the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ir.program import Program
from .arguments import results_of, writable_copy
from .call import Call
from .errors import CaptureError
from .evaluate import evaluate
from .reach import left_by


def identities(
    graph: fx.Graph, leaf: Callable[[fx.Node], Any] = lambda node: node.name, known: dict[Any, int] | None = None
) -> dict[fx.Node, int]:
    """Number the nodes. Nodes that compute the same function of equal leaves get equal numbers."""
    known = {} if known is None else known
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            key = leaf(node)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Number(found[n]))
            key = (node.target, repr(args), repr(sorted(kwargs.items())))
        found[node] = known.setdefault(key, len(known))
    return found


class _Number(int):
    """An operand, by its number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _content(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def alike(first: Program, second: Program) -> bool:
    """Whether two programs have the same operators with the same operands, in any order."""
    known: dict[Any, int] = {}
    outputs = []
    for program in (first, second):

        def leaf(node: fx.Node, program: Program = program) -> Any:
            constant = program.constants.get(node.name)
            if constant is None or isinstance(constant, FakeTensor):
                return program.weights.get(node.name, node.name)
            return _content(constant)

        numbers = identities(program.graph, leaf, known)
        outputs.append([numbers[node] for node in program.graph.find_nodes(op="output")[0].args[0]])
    return outputs[0] == outputs[1]


def check_values(program: Program, model: nn.Module, call: Call, expected: Sequence[Any]) -> None:
    """Raises `CaptureError` if the program's outputs differ from those of the model for the same call.

    Decomposed operators round differently. So the root mean square of the relative difference may be as large as the
    square root of the machine epsilon.
    """
    tensors = [writable_copy(tensor) for tensor in call.tensors]

    def run(copies: dict[str, Any]) -> Any:
        return evaluate(program, model, replace(call, tensors=tuple(tensors), arguments=copies))

    left = [] if call.numbers else left_by(program)  # the last eager run may have had other numbers
    found = results_of(run, call, call.with_numbers(tensors))
    if not call.numbers:
        expected, found = [*expected, *left], [*found, *left_by(program)]
    values = (node.meta.get("val") for node in program.graph.nodes)
    dtypes = {torch.float32, *(v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point())}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    off = [_off(*each) for each in zip(found, expected, strict=True)] if len(found) == len(expected) else [float("inf")]
    if not max(off, default=0.0) <= rounding:
        raise CaptureError(
            f"what was recorded returns something else than the model did: output {off.index(max(off))} is off by "
            f"{max(off):.0e} of its size. Either the model does not do the same twice, or it does something else when "
            "torch.compiler.is_compiling() is true; make both the same"
        )


def _off(found: Any, expected: Any) -> float:
    """The root mean square of a difference, relative to that of `expected`; infinite if shapes or infinities differ."""
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return float("inf") if isinstance(found, Tensor) or isinstance(expected, Tensor) else 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.to(wide), expected.to(wide)
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    finite = b.isfinite()
    difference, size = (a - b)[finite].abs().square().sum(), b[finite].abs().square().sum()
    return (difference / size).sqrt().item() if difference > 0 else 0.0
