"""Explain why a model cannot be split over so many ranks: the message of `WorldSizeError`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import fx

from ..ir.program import Program, calls, exchanges_of, layout_of, shape_of
from .cost import flops, node_flops
from .sizes import Sizes

MOST = 0.9  #: share of the replicated work that the named module must hold


class WorldSizeError(ValueError):
    """The model cannot be shared among so many ranks; the message says what limits it, and how many would do."""


def refusal(
    program: Program,
    world: int,
    lengths: Sequence[int],
    most: int | None,
    larger: Mapping[Sizes, int],
    best: fx.Graph | None,
    cuts: Collection[str],
    bound: float,
) -> str:
    """The text of the error.

    Args:
        program: on whole tensors.
        lengths: rows of the inputs along the dims that could be cut.
        most: the largest number of ranks that would do, if any would.
        larger: the sizes of the input from which on so many ranks could share the model.
        best: the best partitioned graph, if any input has a row for each rank.
        cuts: names of the values that it cuts.
        bound: its speed-up.
    """
    paths = dict(zip(program.inputs, program.input_paths, strict=True))
    if not lengths:
        given = [n for n in program.graph.nodes if n.name in paths and "shape" in n.meta]
        shapes = ", ".join(f"{paths[n.name]} {list(shape_of(n))}" for n in given)
        return (
            "this model cannot be shared among ranks: none of its inputs has rows to cut, as a floating-point tensor "
            "[batch, channels, height, width], [batch, tokens, channels] or [batch, samples] has, or a grid of codes "
            "[batch, rows, columns]; "
            f"it was given {shapes or 'no tensors'}"
        )
    advice = f"at most {most} ranks would do" if most else "run it on one rank"
    if larger:
        rows = " or ".join(f"{rows} rows along dim {each.dim} (it has {each.size})" for each, rows in larger.items())
        advice += f", and {world} ranks need {paths[next(iter(larger)).input]!r} with an estimated {rows}"
    if best is None:
        return (
            f"this model cannot be shared among {world} ranks: its inputs have too few rows, at most {max(lengths)}; "
            f"{advice}"
        )
    where, share, reason = replicated(program.graph, best, cuts)
    limit = f"the slowest rank computes {1 / bound:.0%} of the work"
    if share > (1 / bound - 1 / world) / 2:  # more than half of what the slowest rank computes beyond its share
        limit = f"{where} runs whole on every rank, which is {share:.0%} of the work: {reason}"
    return f"this model cannot be shared among {world} ranks: {limit}; {advice} (the best cut gives {bound:.2f}x)"


def replicated(graph: fx.Graph, best: fx.Graph, cuts: Collection[str]) -> tuple[str, float, str]:
    """What every rank computes whole in the partitioned graph `best`: the module, its share of the work, and why."""
    work: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    reasons = {
        str(node.meta.get("origin")): each.reason
        for node, declared in exchanges_of(best)
        for each in declared
        if each.role in ("fallback", "small")
    }
    for node in calls(best):
        if not layout_of(node).split and not any(layout_of(operand).split for operand in node.all_input_nodes):
            work[node.meta.get("path", "")] += node_flops(node)
            operators[str(node.meta.get("origin", node.name))] += node_flops(node)
    share = sum(work.values()) / flops(graph)
    module = _module(work)
    where = f"the module {module!r}" if module else "a part of it"
    heaviest = next((node for name, _ in operators.most_common(1) for node in graph.nodes if node.name == name), None)
    return where, share, _reason(heaviest, reasons, cuts) if heaviest else ""


def _reason(node: fx.Node, reasons: Mapping[str, str], cuts: Collection[str]) -> str:
    """Why an operator runs whole: the nearest gathering before it, or else that it depends on no cut value."""
    nearest, seen = [node], {node}
    for each in nearest:  # breadth first: the list grows
        if each.name in reasons:
            return reasons[each.name]
        new = [operand for operand in each.all_input_nodes if operand not in seen]
        seen.update(new)
        nearest += new
    if any(each.name in cuts for each in seen):
        return f"{node.target} gets whole operands"
    return "it does not depend on the rows that are cut"


def _module(work: Counter[str]) -> str:
    """The innermost module that most of the work is in, by the paths that do it."""
    module, least = "", MOST * sum(work.values())
    while True:
        start = f"{module}." if module else ""
        inside: Counter[str] = Counter()
        for path, count in work.items():
            if path.startswith(start) and path != module:
                inside[start + path[len(start) :].split(".")[0]] += count
        if not inside or inside.most_common(1)[0][1] < least:
            return module
        module = inside.most_common(1)[0][0]
