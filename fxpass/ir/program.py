"""Programs: one functional ATen graph on whole tensors, before partition and after.

A node of a partitioned graph carries in `meta`:

    shape, dtype   of the *whole* value (law 1)
    layout         the rows on each rank
    path           the module it comes from, e.g. "mid_block.attentions.0.attn1"
    flops          of an operator without a formula: FLOPs of its parts on whole tensors, None if unknown
    resized        present if the value has fewer rows at displaced steps (keys and values in a window)
    placed         the ranks that compute the operator or hold the weight, ascending; all if it is not there
    given          of an input: the layout that it has before the call (`Program.given`)
    kept           of the output node: indices of results that are not gathered (`Program.kept`)
    holes          present if the layout leaves out rows that no operator reads (the operand of a strided convolution);
                   such a value is neither exchanged nor an output

and may have `PerRank` arguments; `specialize` turns it into the static-shape graph of one rank (law 6).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import ops
from .exchange import Exchange
from .layout import WHOLE, Layout, PerRank
from .nodes import append_copy


@dataclass
class Program:
    """A captured model: `graph(weights…, constants…, inputs…) -> flat outputs`, all whole tensors.

    The last outputs are the new values of the inputs `written`.

    The weights stay in the model: they are named here, and looked up at each call.
    """

    graph: fx.Graph
    weights: dict[str, str]  #: placeholder -> the parameter's or buffer's qualified name in the model
    constants: dict[str, Tensor]  #: placeholder -> tensor made while capturing (position tables, masks)
    inputs: tuple[str, ...]  #: placeholders of the tensor inputs, in the order of the flattened call
    input_paths: tuple[str, ...]  #: what the caller calls them, e.g. "added_cond_kwargs.time_ids"
    out_spec: pytree.TreeSpec  #: the structure of (what the model returns, what it puts into each of `changes`)
    out_leaves: tuple[Any, ...]  #: of that what is no tensor, flattened; `...` where an output of the graph goes
    written: tuple[int, ...] = ()  #: inputs that the model writes to in place
    changes: tuple[Change, ...] = ()  #: what else it changes of its arguments
    guards: tuple[Guard, ...] = ()  #: values that inputs must have for this program to be theirs
    seconds: dict[str, float] = field(default_factory=dict)  #: time spent per stage
    attributes: dict[str, str] = field(default_factory=dict)  #: constant -> the plain attribute of the model that it is
    versions: dict[str, int] = field(default_factory=dict)  #: constant -> how often it had been changed in place
    modules: dict[str, str] = field(default_factory=dict)  #: path of each module of the model -> name of its class
    method: str = "forward"  #: the method of the model that was called
    fed: tuple[str, ...] = ()  #: paths of inputs that another part of a pipeline makes anew for each step
    joined: bool = False  #: whether it is made of several parts of a pipeline, each of which has its own arguments
    given: dict[str, Layout] = field(default_factory=dict)  #: inputs of which each rank has its rows, so laid
    kept: tuple[int, ...] = ()  #: outputs of which each rank keeps its own rows, where they are split
    shared: tuple[tuple[SharedResult, ...], ...] = ()  #: outputs that share memory: by piece of memory
    reads: Any = None  #: the Python state beside the model that is baked in: `capture.reads.Reads`

    def with_graph(self, graph: fx.Graph, **changes: Any) -> Program:
        return replace(self, graph=graph, **changes)

    def __str__(self) -> str:
        return f"Program({sum(1 for _ in calls(self.graph))} operators, inputs {', '.join(self.input_paths)})"


@dataclass(frozen=True)
class Given:
    """What the caller has given: the arguments' entry under these keys, one inside the other."""

    place: tuple[Any, ...]


@dataclass(frozen=True)
class SharedResult:
    """An output that shares a piece of memory with others, and where it lies in it."""

    index: int  #: among the outputs
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  #: in elements
    start: int  #: its first byte
    end: int  #: after its last byte
    conj: bool  #: its values are the conjugates of what lies there
    neg: bool  #: its values are the negatives of what lies there


@dataclass(frozen=True)
class Change:
    """Each call changes a dict, list or object: one of the arguments, or Python state that the call leaves behind."""

    place: tuple[Any, ...]  #: of an argument: the keys that lead to it
    removed: tuple[Any, ...]  #: keys
    held: Any = None  #: of Python state: `capture.reach.Place`
    keys: tuple[Any, ...] = ()  #: of Python state: which entries each call puts there
    grows: int | None = None  #: of a list among Python state: entries with keys from here on are appended


@dataclass(frozen=True)
class Guard:
    """Inputs were turned into the Python value `value` while capturing; `graph` computes it anew from other inputs.

    Its placeholders are named as the program's.
    """

    path: str  #: what the caller calls the input, e.g. "encoder_attention_mask"
    value: Any
    line: str  #: the line of the model that did so
    graph: fx.Graph | None = None
    weights: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    shape_only: bool = False  #: only the shape of the result was used (the number of positions that a mask selects)


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of operators in a graph, in order."""
    return (node for node in graph.nodes if node.op == "call_function")


def reached(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """`nodes` and everything that `step` reaches from them; `step` gives a node's users, say, or its operands."""
    found = set(nodes)
    waiting = list(found)
    while waiting:
        new = [node for node in step(waiting.pop()) if node not in found]
        found.update(new)
        waiting += new
    return found


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The whole shape of a node's value."""
    return node.meta["shape"]


def layout_of(node: fx.Node) -> Layout:
    return node.meta.get("layout", WHOLE)


def fetched(node: fx.Node) -> tuple[fx.Node, Exchange] | None:
    """The operand and the declaration of the exchange whose result `node` is; None if it is no such result."""
    if node.target is not operator.getitem:
        return None
    source, place = node.args
    if source.target is ops.wait:  # type: ignore[union-attr]
        source = source.args[0]  # type: ignore[union-attr]
    if source.target is not ops.exchange:  # type: ignore[union-attr]
        return None
    values, declared = source.args  # type: ignore[union-attr]
    return values[place], declared[place]  # type: ignore[index]


def exchanges_of(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[Exchange, ...]]]:
    """The exchange nodes of a partitioned graph, each with its declared exchanges."""
    return ((node, node.args[1]) for node in graph.nodes if node.target is ops.exchange)


def is_on(node: fx.Node, rank: int) -> bool:
    """Whether a rank has a node's value."""
    return "placed" not in node.meta or rank in node.meta["placed"]


def placeholders_on(program: Program, graph: fx.Graph, ranks: Iterable[int]) -> list[str]:
    """The placeholders of the weights that one of some ranks has, in the order of the program.

    Args:
        graph: the partitioned graph of the program.
    """
    ranks = list(ranks)
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    return [name for name in program.weights if any(is_on(nodes[name], rank) for rank in ranks)]


def specialize(graph: fx.Graph, rank: int, *, every: bool = False) -> fx.Graph:
    """The graph of one rank, with the rank's values in place of `PerRank` arguments.

    What is placed on other ranks alone is left out. Where the rank gets a value by an exchange, that has no operand.

    Args:
        every: what is placed on other ranks stays.
    """
    result = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if not every and not is_on(node, rank):
            continue
        new = append_copy(result, node, env.get)
        if node.target in (ops.exchange, ops.wait):
            index = 0 if node.target is ops.exchange else 1
            new.update_arg(index, tuple(value for value in new.args[index] if value is not None))  # type: ignore[union-attr]
        new.args = _chosen(new.args, rank)
        new.kwargs = _chosen(new.kwargs, rank)
        layout = layout_of(node)
        if "shape" in node.meta and "resized" not in node.meta:
            new.meta["local_shape"] = layout.local_shape(node.meta["shape"], rank)
        env[node] = new
    return result


def _chosen(args: Any, rank: int) -> Any:
    if isinstance(args, PerRank):
        return _chosen(args.of(rank), rank)
    if isinstance(args, Exchange):
        return args
    if isinstance(args, (tuple, list)):
        chosen = [_chosen(a, rank) for a in args]
        return chosen if isinstance(args, list) else tuple(chosen)
    if isinstance(args, dict):
        return {k: _chosen(v, rank) for k, v in args.items()}
    if isinstance(args, slice):
        return slice(_chosen(args.start, rank), _chosen(args.stop, rank), _chosen(args.step, rank))
    return args


def fingerprint(graph: fx.Graph) -> str:
    """A hash of what all ranks must agree on: operators, their operands, per-rank arguments, exchanges, layouts."""
    digest = hashlib.sha256()
    number = {node: i for i, node in enumerate(graph.nodes)}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, (tuple, list)):
            return "(" + ",".join(map(text, value)) + ")"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{text(value[k])}" for k in sorted(value)) + "}"
        if isinstance(value, torch.device):
            return value.type  # each rank has a device of its own
        if isinstance(value, ops.Index):
            return hashlib.sha256(value.array.tobytes()).hexdigest()
        return repr(value)

    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
        meta = (node.meta.get("shape"), str(node.meta.get("dtype")), layout_of(node))
        meta += (node.meta["placed"],) if "placed" in node.meta else ()
        digest.update(f"{node.op} {name} {text(node.args)} {text(node.kwargs)} {meta}\n".encode())
    return digest.hexdigest()
