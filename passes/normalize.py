"""normalize: rewrite the program with a small set of operators. Exact.

Views become `reshape`, `permute` or `expand`; selections of rows become `slice`; convolutions become `convolution`;
up-sampling gets explicit sizes. Copies and dead code are removed, equal operators on equal operands are merged, and
values that depend on no input are computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..ir.operators import aliases, spec_of
from ..ir.program import Program
from .builder import Builder, unpacked

aten = torch.ops.aten


def normalize(program: Program) -> Program:
    """The program in normal form, as a new program."""
    b = Builder()
    env: dict[fx.Node, Any] = {}
    constants = {name: tensor for name, tensor in program.constants.items() if type(tensor) is Tensor}
    known: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        b.source = node
        if node.op == "placeholder":
            env[node] = b.graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
            if node.name in program.given:
                env[node].meta["given"] = program.given[node.name]
            if node.name in constants:
                known[env[node]] = constants[node.name]
        elif node.op == "output":
            results = b.graph.output(_outputs(b, node, env, len(program.written)))
            results.meta["kept"] = program.kept
        else:
            rewrite(b, node, env)
    folded = _fold(b.graph, known)
    b.graph.eliminate_dead_code()
    used = {n.name for n in b.graph.nodes if n.op == "placeholder" and n.users}
    for node in list(b.graph.nodes):
        if node.op == "placeholder" and node.name not in used and node.name not in program.inputs:
            b.graph.erase_node(node)
    return program.with_graph(
        b.graph,
        weights={k: v for k, v in program.weights.items() if k in used},
        constants={k: v for k, v in (program.constants | folded).items() if k in used},
    )


def rewrite(b: Builder, node: fx.Node, env: dict[fx.Node, Any]) -> None:
    """Emit the normal form of one operator; `env` maps earlier nodes to theirs."""
    if node.target is operator.getitem:
        env[node] = env[node.args[0]][node.args[1]]  # type: ignore[index]
    elif node.users:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        form = spec_of(node.target).form
        if form is not None:
            env[node] = form(b, node, *args, **kwargs)
        else:
            env[node] = unpacked(b, b.copy(node.target, args, kwargs, node.meta.get("val")))


def _outputs(b: Builder, output: fx.Node, env: Mapping[fx.Node, Any], written: int) -> tuple[fx.Node, ...]:
    """The results in normal form. Where only the merging of operators made one share memory, it is copied.

    The last `written` results are copied into inputs anyway.
    """
    returned: list[fx.Node] = list(output.args[0])  # type: ignore[arg-type]
    results = [env[node] for node in returned]
    bases: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(returned[: len(returned) - written]):
        before, after = _base(node), _base(results[i])
        shared = bases.setdefault(after, before) is not before
        if shared or (after.op == "placeholder" and before.op != "placeholder"):
            b.source = node
            results[i] = b.append(aten.clone.default, (results[i],), {}, node.meta["val"])
    return tuple(results)


def memory_of_their_own(program: Program) -> list[int]:
    """The indices of outputs of a captured program whose memory no input, weight, constant or other output shares."""
    (output,) = program.graph.find_nodes(op="output")
    bases = [_base(node) for node in output.args[0]]
    return [i for i, base in enumerate(bases) if base.op == "call_function" and bases.count(base) == 1]


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` is a view of; itself if it has memory of its own."""
    while node.op == "call_function" and _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    if node.target is aten.reshape.default:
        return node.all_input_nodes[0].meta["val"].is_contiguous()  # others are copied, as a rule
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and aliases(node.target))


def _fold(graph: fx.Graph, known: Mapping[fx.Node, Any]) -> dict[str, Tensor]:
    """Compute values that depend on constants only; those that other operators use become constants."""
    foldable = set(known)
    for node in graph.nodes:
        if node.op == "call_function" and foldable.issuperset(node.all_input_nodes):
            foldable.add(node)
    values: dict[fx.Node, Any] = dict(known)
    waiting = {node: sum(user in foldable for user in node.users) for node in foldable}
    folded: dict[str, Tensor] = {}
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node in foldable and node not in known]:
        args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
        value = values[node] = node.target(*args, **kwargs)
        for operand in node.all_input_nodes:
            waiting[operand] -= 1
        for done in (node, *node.all_input_nodes):
            if not waiting[done]:
                del values[done]  # else a mask that is written row by row is held once per row
        outside = [user for user in node.users if user not in foldable]
        if not outside or not isinstance(value, Tensor):
            continue
        with graph.inserting_before(first):
            constant = graph.placeholder(f"constant_{node.name}")
        constant.meta = dict(node.meta)
        folded[constant.name] = value.contiguous()
        for user in outside:
            user.replace_input_with(node, constant)
    return folded
