"""Split a small function on given cuts, run all ranks, and check law 1.

`split` captures, normalizes, partitions, trims and buckets a function; runs the ranks in lockstep; and compares, on
every rank, *each value of the whole program* with the part of it that its layout promises. Of the values that rules
add, rows that several ranks hold must be equal.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpass.capture import capture
from fxpass.capture.evaluate import bind, run_nodes
from fxpass.ir import comm, ops
from fxpass.ir.exchange import Exchange, Payloads
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Layout, Rows, even, owned, per_rank
from fxpass.ir.nodes import append, append_copy
from fxpass.ir.program import Program, exchanges_of, fingerprint, layout_of, specialize
from fxpass.ir.verify import verify
from fxpass.passes.bucket import bucket
from fxpass.passes.normalize import normalize
from fxpass.passes.partition import Partitioner
from fxpass.passes.rules import RULES
from fxpass.passes.trim import trim

aten = torch.ops.aten
#: operators that move numbers and compute none
MOVES = {
    operator.getitem, ops.exchange, ops.take, ops.select, aten.reshape.default, aten.permute.default,
    aten.expand.default, aten.slice.Tensor, aten.cat.default, aten.constant_pad_nd.default, aten.select.int,
}  # fmt: skip


class Function(nn.Module):
    """A function as a module, so that it can be captured."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Recording(Partitioner):
    """Remembers what each node of the whole program became.

    What is cut becomes a value that was computed in parts: of an input every rank could take any row.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.became: dict[str, fx.Node] = {}

    def _with_cut(self, node: fx.Node, value: Any) -> Any:
        result = super()._with_cut(node, value)
        if isinstance(result, fx.Node) and result.target is ops.take and result is not value:
            like = {"shape": node.meta["shape"], "dtype": node.meta["dtype"], "layout": layout_of(result)}
            result = self.emit(torch.ops.aten.clone.default, (result,), **like)
        if isinstance(result, fx.Node):
            self.became[node.name] = result
        return result


@dataclass
class Split:
    """A program that was split and found right."""

    program: Program
    graph: fx.Graph  #: partitioned and canonical
    layouts: list[Layout]  #: of the outputs, before they are gathered
    exchanges: list[Exchange]
    outputs: list[Tensor]
    error: float = 0.0
    roles: Counter[str] = field(default_factory=Counter)

    @property
    def fallbacks(self) -> list[str]:
        """The reason of each fallback."""
        return [e.reason for e in self.exchanges if e.role == "fallback"]


def split(
    model: Callable[..., Any], inputs: Sequence[Any], cuts: Mapping[int, Layout], world: int, *, exact: bool = True
) -> Split:
    """Cut tensor input i as `cuts[i]` says, on `world` ranks; raises `AssertionError` where law 1 does not hold.

    Every input gets fresh values after the capture. `exact` asserts that there is no fallback and that each output
    is split.
    """
    module = model if isinstance(model, nn.Module) else Function(model)
    program = capture(module.eval(), *inputs)
    verify(program.graph, "captured")
    tensors = [refreshed(x) for x in inputs if isinstance(x, Tensor)]
    program = normalize(program)
    verify(program.graph, "normal")
    layouts_by_name = {program.inputs[i]: layout for i, layout in cuts.items()}
    with torch.no_grad():
        expected = _tensors(module(*_replaced(inputs, tensors)))
    whole = bind(
        program.graph, module, program.weights, program.constants, dict(zip(program.inputs, tensors, strict=True))
    )
    values = {str(node.target): value for node, value in whole.items()}
    doubt = Doubt(program.graph, values, whole)
    computed = run_nodes(program.graph.nodes, whole)
    assert_equal(list(computed), expected, "normalized program")

    partitioner = Recording(program.graph, world, layouts_by_name, RULES)
    graph = partitioner.run()
    verify(graph, "partitioned", world)
    envs = lockstep(graph, world, values)
    check_layouts(graph, envs)
    if overlap(graph):
        check_copies(graph, values, world, partitioner.became)
    for node in program.graph.nodes:
        if (local := partitioner.became.get(node.name)) in envs[0]:
            assert all(rows.runs for rows in layout_of(local).rows), f"a rank is empty: {local.format_node()}"
            for rank, env in enumerate(envs):
                check_part(env[local], whole[node], layout_of(local), rank, node, doubt)
    check_parts_agree(graph, envs)

    canonical = bucket(trim(graph, program.graph, world, RULES))
    verify(canonical, "partitioned", world)
    error = 0.0
    for outputs in (list(env[output_of(canonical)]) for env in lockstep(canonical, world, values)):
        error = max(error, assert_equal(outputs, expected, "outputs", doubt.of_outputs))
    (output,) = program.graph.find_nodes(op="output")
    exchanges = [each for _, declared in exchanges_of(canonical) for each in declared]
    result = Split(
        program,
        canonical,
        [layout_of(partitioner.became[node.name]) for node in output.args[0]],
        exchanges,
        expected,
        error,
        Counter(each.role for each in exchanges),
    )
    assert len(fingerprint(canonical)) == 64
    if exact:
        assert not result.fallbacks, result.fallbacks
    return result


# -- running ---------------------------------------------------------------------------------------------------------


def lockstep(graph: fx.Graph, world: int, values: Mapping[str, Tensor]) -> list[dict[fx.Node, Any]]:
    """Every rank's value of every node of a partitioned graph."""
    locals_ = [specialize(graph, rank) for rank in range(world)]
    envs: list[dict[fx.Node, Any]] = [{} for _ in range(world)]
    own: list[dict[fx.Node, Any]] = [{} for _ in range(world)]
    with torch.no_grad():
        for node, *parts in zip(graph.nodes, *(local.nodes for local in locals_), strict=True):
            args = [fx.node.map_arg((n.args, n.kwargs), env.__getitem__) for n, env in zip(parts, own, strict=True)]
            if node.op == "placeholder":
                results = [values[str(node.target)]] * world
            elif node.op == "output":
                results = [a[0][0] for a in args]
            elif node.target is ops.exchange:
                results = exchanged(node.args[1], [a[0][0] for a in args])
            else:
                results = [n.target(*a[0], **a[1]) for n, a in zip(parts, args, strict=True)]
            for rank in range(world):
                envs[rank][node] = own[rank][parts[rank]] = results[rank]
                if "shape" in parts[rank].meta:
                    assert tuple(results[rank].shape) == parts[rank].meta["local_shape"], (
                        f"rank {rank}: {node.format_node()}"
                    )
    return envs


def with_rounding(graph: fx.Graph, world: int) -> fx.Graph:
    """A copy of a partitioned graph in which equal rows that several ranks compute differ in the last bits.

    Kernels round differently for different sizes, but not on every machine: here rank k's result of each operator on
    split operands is off by k units in the last place.
    """
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = env[node] = append_copy(result, node, env.__getitem__)
        dtype = node.meta.get("dtype", torch.int64)
        if not (dtype.is_floating_point or dtype.is_complex) or node.op != "call_function" or node.target in MOVES:
            continue
        if layout_of(node).split or any(layout_of(operand).split for operand in node.all_input_nodes):
            off = per_rank([1 + rank * torch.finfo(dtype).eps for rank in range(world)])
            env[node] = append(result, aten.mul.Scalar, (new, off), meta=node.meta)
    return result


def check_copies(graph: fx.Graph, values: Mapping[str, Tensor], world: int, became: Mapping[str, fx.Node]) -> None:
    """Law 3: what every rank holds is the same bits on all of them, though they round differently."""
    rounded = with_rounding(graph, world)
    first, *others = lockstep(rounded, world, values)
    names = {node.name for node in became.values() if not layout_of(node).split} | {
        node.name for node in graph.nodes if _is_result(node) and not layout_of(node).split
    }
    for node in rounded.nodes:
        if node.name in names and isinstance(first[node], Tensor):
            for rank, env in enumerate(others, 1):
                assert same_bits(env[node], first[node]), f"rank {rank} and rank 0 differ: {node.format_node()}"


def _is_result(node: fx.Node) -> bool:
    """Whether the node is a result of an exchange."""
    return node.target is operator.getitem and node.args[0].target is ops.exchange


def overlap(graph: fx.Graph) -> bool:
    """Whether some row of some value is computed by several ranks."""
    return any(owned(rows) != rows for node in graph.nodes if (rows := layout_of(node).rows))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def exchanged(declared: Sequence[Exchange], operands: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """`operands[rank][i]` through exchange i: `result[rank][i]`."""
    world = len(operands)
    columns = []
    for i, exchange in enumerate(declared):
        xs = [values[i] for values in operands]
        sent = [exchange.pack(rank, x) for rank, x in enumerate(xs)]
        for src in range(world):
            for dst in range(world):
                payload = sent[src][dst]
                assert (0 if payload is None or src == dst else payload.numel()) == exchange.numel(src, dst)
                assert payload is None or tuple(payload.shape) == exchange.payload_shape(src, dst)
        columns.append([_unpacked(exchange, dst, xs[dst], sent) for dst in range(world)])
    return [tuple(column[rank] for column in columns) for rank in range(world)]


def _unpacked(exchange: Exchange, rank: int, x: Tensor, sent: Sequence[Payloads]) -> Tensor:
    """Rank `rank`'s result: by the exchange itself, and by the operators of step programs, which must agree."""
    payloads = [None if src == rank else parts[rank] for src, parts in enumerate(sent)]
    result = exchange.unpack(rank, x, payloads)
    if any(payload is not None for payload in payloads):
        received = comm.assemble(exchange, rank, payloads, x.device)
        assert tuple(received.shape) == comm.received_shape(exchange, rank)
        assert same_bits(comm.unpack(x, received, exchange, rank), result)
    return result


def output_of(graph: fx.Graph) -> fx.Node:
    (node,) = graph.find_nodes(op="output")
    return node


# -- comparing -------------------------------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype) -> float:
    """Of max |difference| / max |value|."""
    return 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5


class Doubt:
    """How far the values of a whole program are off by themselves, in units of max |value|.

    The program is computed once more, with each result another one in the last bit, and in another order in memory: a
    normalization of almost equal values amplifies rounding by up to 300, and torch's kernel for channels last by more.
    """

    def __init__(self, graph: fx.Graph, values: Mapping[str, Tensor], whole: Mapping[fx.Node, Any]) -> None:
        self.graph, self.values, self.whole = graph, values, whole

    @cached_property
    def _again(self) -> dict[fx.Node, Any]:
        found: dict[fx.Node, Any] = {n: self.values[str(n.target)] for n in self.graph.find_nodes(op="placeholder")}
        for node in self.graph.nodes:
            run_nodes([node], found)
            if node.op == "call_function" and isinstance(x := found[node], Tensor) and x.dtype.is_floating_point:
                odd = torch.arange(x.numel(), dtype=x.dtype).remainder(2).view(x.shape)
                found[node] = x.contiguous() * (1 + odd * torch.finfo(x.dtype).eps)
        return found

    def of(self, node: fx.Node) -> float:
        value, other = self.whole[node], self._again[node]
        finite = torch.isfinite(value) & torch.isfinite(other)
        if not value.dtype.is_floating_point or not finite.any():
            return 0.0
        off = (value - other)[finite].abs().max().item() / max(value[finite].abs().max().item(), 1e-30)
        return off if off < 1e3 * tolerance(value.dtype) else 0.0  # more is another choice, as of an `argmax`

    def of_outputs(self, i: int) -> float:
        outputs: Any = output_of(self.graph).args[0]
        return self.of(outputs[i])


def assert_equal(
    found: Sequence[Tensor], expected: Sequence[Tensor], what: str, doubt: Callable[[int], float] = lambda i: 0.0
) -> float:
    """Returns the largest difference. `doubt`: of each value, for those that differ more than is tolerated."""
    error = 0.0
    assert len(found) == len(expected), what
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{what}: {a.dtype}, expected {b.dtype}"
        if a.numel() == 0 or torch.equal(a, b):
            continue
        finite = torch.isfinite(b)
        assert torch.equal(a[~finite], b[~finite]) or torch.equal(a[~finite].isnan(), b[~finite].isnan()), what
        worst = (a[finite] - b[finite]).abs().max().item() / max(b[finite].abs().max().item(), 1e-30)
        within = worst <= tolerance(a.dtype) or worst <= tolerance(a.dtype) + 3 * doubt(i)
        assert within, f"{what}: differs by {worst:.1e}"
        error = max(error, worst)
    return error


def check_part(local: Any, whole: Any, layout: Layout, rank: int, node: fx.Node, doubt: Doubt) -> None:
    """Law 1: rank k holds `whole.index_select(dim, rows[k])`."""
    if not isinstance(whole, Tensor):
        return
    part = whole
    if layout.split:
        part = whole.index_select(layout.axis, torch.from_numpy(layout.rows[rank].array.copy()))
    worst = (whole if whole.is_complex() else whole.double()).abs()
    scale = worst[torch.isfinite(worst)].max().item() if worst.numel() and torch.isfinite(worst).any() else 0.0
    assert local.shape == part.shape, (
        f"rank {rank}: {node.format_node()}: {tuple(local.shape)}, law 1 says {tuple(part.shape)}"
    )
    assert local.dtype == part.dtype, f"rank {rank}: {node.format_node()}: {local.dtype}, the whole is {part.dtype}"
    if part.numel() and not torch.equal(local, part):
        finite = torch.isfinite(part)
        error = (local[finite] - part[finite]).abs().max().item() if finite.any() else 0.0
        allowed, scale = tolerance(part.dtype), max(scale, 1e-30)
        assert error <= allowed * scale or error <= (allowed + 3 * doubt.of(node)) * scale, (
            f"rank {rank}: {node.format_node()} differs by {error:.1e} of {scale:.1e}"
        )


def check_layouts(graph: fx.Graph, envs: Sequence[Mapping[fx.Node, Any]]) -> None:
    """Every value has the dtype that is said of it (`lockstep` looks at the shapes)."""
    for node in graph.nodes:
        if "shape" not in node.meta:
            continue
        for env in envs:
            assert env[node].dtype == node.meta["dtype"], (
                f"{node.format_node()}: {env[node].dtype} {node.meta['dtype']}"
            )


def check_parts_agree(graph: fx.Graph, envs: Sequence[Mapping[fx.Node, Any]]) -> None:
    """Law 1 of every value, also of those that the whole program lacks: the parts are rows of one whole value."""
    partial = partial_results(graph)
    for node in graph.nodes:
        if "shape" not in node.meta or node in partial or node.target in UNINITIALISED:
            continue
        layout = layout_of(node)
        rows = layout.rows if layout.split else (Rows.interval(0, 1),) * len(envs)
        parts = [env[node] if layout.split else env[node][None] for env in envs]
        dim = layout.dim or 0
        for rank, (part, mine) in enumerate(zip(parts, rows, strict=True)):
            for other, theirs in zip(parts[:rank], rows, strict=False):
                both = mine & theirs
                found, expected = ops.take(part, dim, mine.locate(both)), ops.take(other, dim, theirs.locate(both))
                assert torch.allclose(found, expected, rtol=0, atol=_rounding(expected), equal_nan=True), (
                    f"rank {rank} has other rows than the ranks before it: {node.format_node()}"
                )


UNINITIALISED = {aten.empty_like.default, aten.new_empty.default}


def _rounding(x: Tensor) -> float:
    finite = x[torch.isfinite(x)] if x.dtype.is_floating_point or x.dtype.is_complex else x[:0]
    return tolerance(x.dtype) * finite.abs().max().item() if finite.numel() else 0.0


def partial_results(graph: fx.Graph) -> set[fx.Node]:
    """What each rank computes of its rows alone, for nothing but a sum or the moments of all ranks."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        local = node.op == "call_function" and node.target is not ops.exchange and not layout_of(node).split
        if local and any(layout_of(n).split or n in found for n in node.all_input_nodes):
            found.add(node)
    merged = {
        value
        for node, declared in exchanges_of(graph)
        for value, exchange in zip(node.args[0], declared, strict=True)  # type: ignore[arg-type]
        if not isinstance(exchange, Fetch)
    }
    for node in reversed(graph.nodes):
        users = {user for user in node.users if not (user.target is ops.exchange and node in merged)}
        if node in found and not users <= found:
            found.discard(node)
    return found


# -- cuts ------------------------------------------------------------------------------------------------------------


def refreshed(x: Tensor) -> Tensor:
    """Other values of the same kind: what was captured may not be in the program. Integers and booleans are kept."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return torch.randn(x.shape, dtype=x.dtype)
    return x


def _replaced(inputs: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    supply = iter(tensors)
    return [next(supply) if isinstance(x, Tensor) else x for x in inputs]


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def cut(dim: int, *parts: Any) -> Layout:
    """A layout from interval bounds (a, b) or lists of positions."""
    return Layout(dim, tuple(Rows.interval(*p) if isinstance(p, tuple) else Rows.of(p) for p in parts))


def evenly(dim: int, size: int, world: int) -> Layout:
    return Layout(dim, even(size, world))


@st.composite
def rows(draw: st.DrawFn, size: int, world: int, *, kinds: str = "uneven overlapping strided any") -> tuple[Rows, ...]:
    """Non-empty sets that cover 0 … size-1, of `world` ranks: of the given kinds, or intervals where rows are fewer."""
    if size < world:
        places = [k if k < size else draw(st.integers(0, size - 1)) for k in draw(st.permutations(range(world)))]
        more = st.integers(0, size)
        return tuple(Rows.interval(max(0, k - draw(more)), min(size, k + 1 + draw(more))) for k in places)
    kind = draw(st.sampled_from(kinds.split()))
    if kind in ("uneven", "overlapping"):
        cuts = (
            sorted(draw(st.sets(st.integers(1, size - 1), min_size=world - 1, max_size=world - 1))) if world > 1 else []
        )
        bounds = [*zip([0, *cuts], [*cuts, size], strict=True)]
        if kind == "overlapping":
            more = st.integers(0, 3)
            bounds = [(max(0, a - draw(more)), min(size, b + draw(more))) for a, b in bounds]
        return tuple(Rows.interval(a, b) for a, b in bounds)
    if kind == "strided":
        return tuple(Rows.of(range(k, size, world)) for k in range(world))
    owner = draw(st.lists(st.integers(0, world - 1), min_size=size, max_size=size))
    sets = [{i for i, o in enumerate(owner) if o == k} for k in range(world)]
    for k, mine in enumerate(sets):
        if not mine:
            mine.add(k)
    return tuple(Rows.of(sorted(mine)) for mine in sets)


@st.composite
def layouts(
    draw: st.DrawFn,
    shape: Sequence[int],
    world: int,
    *,
    dims: Sequence[int] | None = None,
    kinds: str = "uneven overlapping strided any",
    fewest: int | None = None,
) -> Layout:
    """A cut of one of the dims (of `dims`) that have `fewest` rows, by default one for each rank."""
    can = [d for d in (range(len(shape)) if dims is None else dims) if shape[d] >= (fewest or world)]
    dim = draw(st.sampled_from(can))
    return Layout(dim, draw(rows(shape[dim], world, kinds=kinds)))
