"""Do two recorded graphs compute the same?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..ir.program import Program


def identities(
    graph: fx.Graph, leaf: Callable[[fx.Node], Any] = lambda node: node.name, known: dict[Any, int] | None = None
) -> dict[fx.Node, int]:
    """A number for each node, equal for nodes that compute the same of equal leaves."""
    known = {} if known is None else known
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            key = leaf(node)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Number(found[n]))
            key = (str(node.target), repr(args), repr(sorted(kwargs.items())))
        found[node] = known.setdefault(key, len(known))
    return found


class _Number(int):
    """An operand, by its number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _content(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def alike(first: Program, second: Program) -> bool:
    """Whether two programs compute the same, operator by operator, in whatever order."""
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
