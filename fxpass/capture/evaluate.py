"""Run a graph of whole tensors, one operator after the other: for guards, and for tests of whole programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.operators import spec_of
from ..ir.ops import dense
from ..ir.program import Program
from .arguments import check_memory, returned
from .call import Call

aten = torch.ops.aten


def lookup(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or plain attribute of a model by qualified name, or a tensor that one is made of."""
    return attrgetter(name)(model)


def run_nodes(
    nodes: Iterable[fx.Node], values: dict[fx.Node, Any], done: Mapping[fx.Node, Sequence[fx.Node]] | None = None
) -> Any:
    """Compute call nodes in order into `values`, which has the placeholders'; returns what the output node holds.

    Args:
        done: for each node, the values to release after it.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in {v.device.type for v in values.values() if isinstance(v, Tensor)}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))  # the graph holds the casts
        for node in nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = _call(node.target, args, kwargs)
                for old in done.get(node, ()) if done else ():
                    del values[old]
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
    return None


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator's result, also where an operand lies in another order in memory than what was captured.

    Operators on fake tensors may promise another order than they keep on real ones, as `roll` does.
    """
    if target in (aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default(*args, **kwargs)
    if spec_of(target).dense:
        return target(dense(args[0]), *args[1:], **kwargs)
    return target(*args, **kwargs)


def bind(
    graph: fx.Graph,
    model: nn.Module,
    weights: Mapping[str, str],
    constants: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> dict[fx.Node, Any]:
    """A value for each placeholder."""
    values: dict[fx.Node, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name in weights:
            values[node] = lookup(model, weights[name])
        else:
            values[node] = constants[name] if name in constants else inputs[name]
    return values


def evaluate(program: Program, model: nn.Module, call: Call) -> Any:
    """Run the program in place of `model`: return its outputs, and write to the call's arguments as the model does."""
    inputs = dict(zip(program.inputs, call.tensors, strict=True))
    values = bind(program.graph, model, program.weights, program.constants, inputs)
    check_memory(program, model, call)
    return returned(program, run_nodes(program.graph.nodes, values, _done(program.graph)), call)


def _done(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later node uses."""
    done: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        new = [n for n in (node, *node.all_input_nodes) if n not in seen]
        seen.update(new)
        done[node] = new
    return done
