"""samples: divide the samples of a batch among groups of ranks, where the graph shows that they are independent. Exact.

The batch dim of the inputs is cut by the same partitioner and rules as rows are. The samples are independent if that
needs no exchange but the gather of the outputs, and if all groups run the same operators with the same arguments on
their parts of the inputs. Then the local graph of one group is again a program in normal form, with smaller shapes,
which the later passes split over the ranks of a group; `join` adds what the groups take of the inputs and the gather.

Which inputs have a batch dim is guessed: those that have as many entries along dim 0 as the input on which most work
depends. A wrong guess does no harm, for then the proof fails, and it is tried without the smaller of them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx.node import map_arg

from ..capture.fakes import form_of
from ..ir import ops
from ..ir.exchange import Exchange
from ..ir.layout import WHOLE, Layout, PerRank, even, full
from ..ir.operators import spec_of
from ..ir.program import Program, calls, layout_of, reached, shape_of
from .cuts import downstream, inputs_with_rows
from .decompose import count_work
from .partition import Rule, partition
from .trim import trim

TRIES = 6  #: partitions of the graph until a guess of the inputs with a batch dim is given up


class SamplesError(Exception):
    """The samples of a batch cannot be divided among the groups; the message is the reason."""


class IndivisibleError(SamplesError):
    """There are too few of them, or as many as cannot be divided evenly."""


@dataclass(frozen=True)
class Samples:
    """How the samples of a batch are divided.

    Attributes:
        program: of the samples of one group, in normal form.
        taken: what each group takes of a placeholder of the whole program, by its name.
        results: of each output, the part that each group computes; WHOLE if all compute the same.
        calls: 1; or how many calls are stacked along a new dim 0 of all inputs and outputs: each group runs one.
    """

    program: Program
    taken: Mapping[str, Layout]
    results: tuple[Layout, ...]
    calls: int = 1


def stacked(program: Program, calls: int) -> Samples:
    """The program unchanged; each group runs a call of its own."""
    each = Layout(0, even(calls, calls))
    (output,) = program.graph.find_nodes(op="output")
    return Samples(program, dict.fromkeys(program.inputs, each), (each,) * len(output.args[0]), calls)


def undivided(program: Program) -> Samples:
    """All samples, for one group. Raises `SamplesError` if no output has entries that can be gathered."""
    (output,) = program.graph.find_nodes(op="output")
    shapes = [shape_of(each) for each in output.args[0]]
    results = tuple(Layout(0, full(shape[0], 1)) if prod(shape) and shape else WHOLE for shape in shapes)
    if not any(each.split for each in results):
        raise SamplesError("no output can be gathered from one group")
    return Samples(program, {}, results)


def copied(samples: Samples, copies: int) -> Samples:
    """Let so many groups work on each part; those that do the same come one after the other."""

    def again(layout: Layout) -> Layout:
        return Layout(layout.dim, tuple(rows for rows in layout.rows for _ in range(copies)))

    if copies == 1:
        return samples
    taken = {name: again(layout) for name, layout in samples.taken.items()}
    return replace(samples, taken=taken, results=tuple(again(r) if r.split else r for r in samples.results))


def divide(program: Program, groups: int, rules: Mapping[Any, Rule]) -> Samples:
    """Divide the samples of a program in normal form.

    Raises:
        SamplesError: the batch cannot be divided evenly, or the samples are not known to be independent.
    """
    main, batched = _batched(program, groups)
    size = shape_of(main)[0]
    reason: str | None = None
    for _ in range(TRIES):
        cuts = {node.name: Layout(0, even(size, groups)) for node in batched}
        graph = trim(partition(program.graph, groups, cuts, rules), program.graph, groups, rules)
        try:
            return _divided(program, graph)
        except _MixedError as mixed:
            reason = reason or mixed.reason
            before = {node.name for node in reached([mixed.node], operator.attrgetter("all_input_nodes"))}
            wrong = [node for node in batched if node is not main and node.name in before]
            if not wrong:
                break
            batched.remove(min(wrong, key=lambda node: prod(shape_of(node))))
    assert reason is not None
    raise SamplesError(reason)


class _MixedError(Exception):
    """A node of a partitioned graph that does not treat all samples alike, and by themselves."""

    def __init__(self, node: fx.Node, what: str) -> None:
        self.node = node
        self.reason = f"{node.meta.get('origin', node.name)} in {node.meta.get('path') or 'the model'} {what}"
        super().__init__(self.reason)


def _batched(program: Program, groups: int) -> tuple[fx.Node, list[fx.Node]]:
    """The input on which most work depends, and all inputs that have as many entries along dim 0."""
    candidates = [node for node in inputs_with_rows(program.graph, program.inputs) if shape_of(node)[0]]
    if not candidates:
        raise SamplesError("no input is known to have a batch dim")
    weight = downstream(program.graph)
    main = max(candidates, key=lambda node: (weight[node], node.meta["val"].numel()))
    size = shape_of(main)[0]
    if size % groups:
        path = dict(zip(program.inputs, program.input_paths, strict=True))[main.name]
        raise IndivisibleError(
            f"`{path}` has {size} sample{'s' * (size > 1)}, which {groups} groups cannot share equally"
        )
    placeholders = [node for node in program.graph.nodes if node.name in program.inputs and "shape" in node.meta]
    return main, [node for node in placeholders if shape_of(node)[:1] == (size,)]


def _divided(program: Program, graph: fx.Graph) -> Samples:
    """Raises `_MixedError` unless a graph that is partitioned along the batch does the same on all parts."""
    takes: dict[fx.Node, fx.Node] = {}  #: placeholder -> what is taken of it
    for node in calls(graph):
        if node.target is ops.exchange:
            _check_gather(node)
        elif _differs(node.args) or _differs(node.kwargs):
            source = node.args[0]
            if node.target is not ops.take or source.op != "placeholder":
                raise _MixedError(node, "depends on the place of a sample in the batch")
            takes[source] = node  # type: ignore[index]
    for source, node in takes.items():
        if len(source.users) > 1:
            user = next(user for user in source.users if user is not node)
            raise _MixedError(user if user.op != "output" else node, "reads samples of other groups")
    (output,) = graph.find_nodes(op="output")
    results = tuple(layout_of(each.args[0].args[0][0]) if _gathered(each) else WHOLE for each in output.args[0])
    if not any(layout.split for layout in results):
        raise _MixedError(output.args[0][0], "is an output that does not depend on the batch")
    part = _one_group(graph, takes)
    count_work(part)
    taken = {source.name: layout_of(node) for source, node in takes.items()}
    return Samples(replace(program, graph=part), taken, results)


def _check_gather(node: fx.Node) -> None:
    """Raises `_MixedError` if an exchange is anything but the gather of an output."""
    declared: Exchange = node.args[1][0]  # type: ignore[index,assignment]
    if declared.role != "output":
        why = f"{declared.role}: {declared.reason}" if declared.reason else declared.role
        raise _MixedError(node, f"mixes the samples of a batch ({why})")


def _gathered(node: fx.Node) -> bool:
    """Whether a node is the result of an exchange."""
    return node.target is operator.getitem and node.args[0].target is ops.exchange


def _differs(tree: Any) -> bool:
    """Whether an argument differs from group to group."""
    if isinstance(tree, slice):
        return _differs((tree.start, tree.stop, tree.step))
    if isinstance(tree, (tuple, list)):
        return any(map(_differs, tree))
    return any(map(_differs, tree.values())) if isinstance(tree, dict) else isinstance(tree, PerRank)


def _one_group(graph: fx.Graph, takes: Mapping[fx.Node, fx.Node]) -> fx.Graph:
    """The program of the first group, which is that of each: a graph on its part of the placeholders."""
    part = fx.Graph()
    env: dict[fx.Node, Any] = {}
    values = _Values(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = part.placeholder(node.name)
            env[node].meta = {key: value for key, value in node.meta.items() if key != "layout"}
            if node in takes:
                local = layout_of(takes[node])
                env[node].meta |= _described(values.of(ops.take, (node.meta["val"], local.axis, local.rows[0]), {}))
        elif node.op == "output":
            part.output(map_arg(node.args[0], env.__getitem__))
        elif node in takes.values():
            env[node] = env[node.args[0]]
        elif node.target is ops.exchange:
            env[node] = [env[value] for value in node.args[0]]
        elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = _computed(part, node, env, values)
    part.lint()
    return part


class _Values:
    """Computes fake values; equal operators on operands of equal form are computed once."""

    def __init__(self, graph: fx.Graph) -> None:
        values = (node.meta.get("val") for node in graph.nodes)
        self._mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        self._known: dict[Any, Any] = {}

    def of(self, target: Any, args: Any, kwargs: Any) -> Any:
        key = target, form_of(args), form_of(kwargs)
        if key not in self._known:
            with self._mode:
                self._known[key] = target(*args, **kwargs)
        return self._known[key]


def _computed(part: fx.Graph, node: fx.Node, env: Mapping[fx.Node, Any], values: _Values) -> fx.Node:
    """A copy of an operator, named as in the whole program, with the value that it has on one group's samples.

    Raises:
        _MixedError: it is none of those that programs in normal form have.
    """
    spec = spec_of(node.target)
    plain = isinstance(node.target, OpOverload) and node.target not in ops.LOCAL
    if node.target is not operator.getitem and (not plain or (spec.form is not None and spec.rule is None)):
        raise _MixedError(node, "cannot be computed on some of the samples by itself")
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
    about = {key: node.meta[key] for key in ("path", "origin")}
    new = part.create_node("call_function", node.target, args, kwargs, name=about["origin"])
    fakes = map_arg((args, kwargs), lambda each: each.meta["val"])
    new.meta = about | _described(values.of(node.target, *fakes))
    return new


def _described(value: Any) -> dict[str, Any]:
    """The metadata of a value."""
    described = {"val": value}
    if isinstance(value, Tensor):
        described |= {"shape": tuple(value.shape), "dtype": value.dtype}
    return described
