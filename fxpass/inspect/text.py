"""A snapshot as text: unfolded, one line per operator, grouped by module; folded, repeated modules once.

down_blocks.0.resnets.0.conv1
  x3.0  getitem_2  [B, C, H/2, W]  1x16x18x16 (H: 18 of 34)  float32  halo(H: 1 down) of silu_1; 1.0 kB
  conv2d_1  [B, C, H/2, W]  1x16x16x16 (H: 16 of 32)  float32  conv2d(getitem_2, .weight, .bias, …); 1.2 GFLOP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod

import torch

from .fold import Block, Group, fold, opened
from .record import CutRecord, ExchangeRecord, Node, Snapshot
from .words import bytes_text, count_text, cuts_text, filled, flops_text, layout_text, seconds_text, sizes_text

WHOLE_MODEL = "(the model itself)"


def text(snapshot: Snapshot, *, folded: bool = True) -> str:
    """The graph, below a heading with what is cut, its costs and its fallbacks."""
    body = _folded(snapshot) if folded else _unfolded(snapshot)
    return "\n".join([*_heading(snapshot), "", *_inputs(snapshot), *body, *_outputs(snapshot)])


def _heading(snapshot: Snapshot) -> Iterator[str]:
    yield from (f"split: {cut.label} {layout}, {rows}" for cut in snapshot.cuts for layout, rows in [cut_texts(cut)])
    operators = [node for node in snapshot.nodes if node.kind == "operator"]
    parts = [count_text(len(operators), "operator")]
    if work := sum(node.flops for node in operators):
        parts.append(flops_text(work))
    if snapshot.messages:
        parts.append(
            f"{count_text(len(snapshot.exchanges), 'exchange')} in {count_text(len(snapshot.messages), 'message')}"
        )
        parts.append(f"{bytes_text(snapshot.received())} received in an exact step")
        if any(each.exact != each.steady for each in snapshot.exchanges):
            parts.append(f"{bytes_text(snapshot.received(exact=False))} in a displaced one")
        if padding := sum(each.padding[snapshot.rank] for each in snapshot.messages):
            parts.append(f"{bytes_text(padding)} of padding over NCCL")
    seconds = sum(node.seconds for node in operators), sum(n.seconds for n in snapshot.nodes if n.kind == "exchange")
    parts.append(f"on {snapshot.target} about {seconds_text(seconds[0])} of computation")
    if snapshot.messages:
        parts.append(f"{seconds_text(seconds[1])} of exchanges")
    yield ", ".join(parts)
    yield from (f"estimated: {n} x {name}, counted as matrix products" for name, n in snapshot.estimated.items())
    yield from (f"uncounted: {n} x {name}, whose work is unknown" for name, n in snapshot.uncounted.items())
    for each in snapshot.fallbacks:
        yield f"fallback {', '.join(each.exchanges)}: {each}"


def cut_texts(cut: CutRecord) -> tuple[str, str]:
    """The layout of a value that is cut, and the positions of its cuts."""
    return layout_text(cut.shape, cut.layout), cuts_text(cut.layout.rows, cut.shape[cut.layout.axis])


def _inputs(snapshot: Snapshot) -> Iterator[str]:
    inputs = [node for node in snapshot.nodes if node.kind == "input"]
    if inputs:
        yield "inputs"
        yield from (f"  {node.operator}  {placed_text(node, snapshot.rank)}".rstrip() for node in inputs)
    for kind in ("weight", "constant"):
        nodes = [node for node in snapshot.nodes if node.kind == kind and node.shape is not None]
        if nodes:
            yield f"{kind}s: {len(nodes)}, {bytes_text(sum(_size(node) for node in nodes))}"


def _size(node: Node) -> int:
    return prod(node.shape or ()) * getattr(torch, node.dtype).itemsize


def _outputs(snapshot: Snapshot) -> Iterator[str]:
    for node in snapshot.nodes:
        if node.kind == "output":
            yield "outputs"
            yield from (f"  {_name(each, snapshot)}" for each in node.operands)


# ------------------------------------------------------------------------------------------------- one node


def placed_text(node: Node, rank: int) -> str:
    """Layout, sizes and dtype of a node's value; empty for an operator with several results."""
    if node.shape is None or node.layout is None:
        return ""
    return f"{layout_text(node.shape, node.layout)}  {sizes_text(node.shape, node.layout, rank)}  {node.dtype}  "


def _name(name: str, snapshot: Snapshot, path: str = "") -> str:
    """A value's name; of inputs and weights that of caller and model, of weights of the module `path` its end."""
    node = snapshot.by_name.get(name)
    if node is None or node.kind not in ("input", "weight"):
        return name
    return node.operator[len(path) :] if path and node.operator.startswith(f"{path}.") else node.operator


def call_text(node: Node, snapshot: Snapshot) -> str:
    """`conv2d(silu_1, .weight, .bias, [1, 1])`."""
    operands = [_name(each, snapshot, node.path) for each in node.operands]
    return f"{node.operator}({filled(node.arguments, operands)})"


def lines_of(node: Node, snapshot: Snapshot) -> Iterator[str]:
    """The lines of a node; none for what others say already."""
    if node.kind == "exchange":
        message = snapshot.message_of[node.name]
        padding = _padding(message.padding[snapshot.rank])
        some = [snapshot.by_id[each] for each in node.exchanges]
        if len(some) > 1:
            size = bytes_text(sum(each.exact[snapshot.rank] for each in some))
            yield f"{node.name}  one message of {len(some)} values; {size}{padding}"
            padding = ""
        yield from (_exchange_line(each, snapshot) + padding for each in some)
    elif node.kind == "wait":
        results = [snapshot.by_id[each].result for each in node.exchanges]
        yield f"{', '.join(filter(None, results)) or node.name}  arrived"
    elif node.kind == "operator":
        cost = f"; {flops_text(node.flops)}" if node.flops else ""
        yield f"{node.name}  {placed_text(node, snapshot.rank)}{call_text(node, snapshot)}{cost}"


def _exchange_line(each: ExchangeRecord, snapshot: Snapshot) -> str:
    """One value of a message, under the name of its result in the graph."""
    result = snapshot.by_name.get(each.result)
    placed = placed_text(result, snapshot.rank) if result else ""
    fresh = "" if each.fresh == "sync" else f"{each.fresh} "
    role = "" if each.text.startswith(f"{each.role}(") else f" for {each.role}"
    exact, steady = each.exact[snapshot.rank], each.steady[snapshot.rank]
    coded = f" in changes of {each.bits} bits" if each.bits else ""
    later = f", then {bytes_text(steady)}{coded}" if each.fresh != "sync" and steady != exact else ""
    reason = f"; because {each.reason}" if each.reason else ""
    of = f" of {_name(each.operand, snapshot, each.path)}{role}; {bytes_text(exact)}{later}{reason}"
    return f"{each.id}  {each.result or '(unused)'}  {placed}{fresh}{each.text}{of}"


def _padding(count: int) -> str:
    return f"; padding {bytes_text(count)} over NCCL" if count else ""


# ------------------------------------------------------------------------------------------------ all nodes


def _unfolded(snapshot: Snapshot) -> Iterator[str]:
    path = None
    for node in snapshot.nodes:
        lines = list(lines_of(node, snapshot))
        if lines and node.path != path:
            path = node.path
            yield path or WHOLE_MODEL
        yield from (f"  {line}" for line in lines)


def _folded(snapshot: Snapshot) -> Iterator[str]:
    """Modules in a tree with sums; exchanges and operators that multiply matrices have lines, others are counted."""
    root = fold(snapshot)
    if root.nodes:
        yield f"{WHOLE_MODEL}{_sums(root.nodes, snapshot)}"
        yield from (f"  {line}" for line in _own_lines(root, snapshot))
    for group in root.groups:
        yield from _group_lines(group, snapshot, "")


def _group_lines(group: Group, snapshot: Snapshot, indent: str) -> Iterator[str]:
    title, group = opened(group)
    block, count = group.first, len(group.blocks)
    head = f"{count} x {block.kind or 'module'}  {title}" if count > 1 else f"{title}  {block.kind}".rstrip()
    nodes = list(block.inside())
    if group.like:
        yield f"{indent}{head}  as {group.like}"
    elif len(nodes) == 1 and nodes[0].kind == "operator":
        (line,) = lines_of(nodes[0], snapshot)
        yield f"{indent}{head}  {line}"
    else:
        yield f"{indent}{head}{_sums(nodes, snapshot, 'each ' if count > 1 else '')}"
        yield from (f"{indent}  {line}" for line in _own_lines(block, snapshot))
        for inner in block.groups:
            yield from _group_lines(inner, snapshot, indent + "  ")


def _own_lines(block: Block, snapshot: Snapshot) -> Iterator[str]:
    """The nodes of a module itself."""
    counted: Counter[str] = Counter()
    for node in block.nodes:
        if node.kind == "exchange" or node.flops:
            yield from lines_of(node, snapshot)
        elif node.kind == "operator":
            counted[node.operator] += 1
    if counted:
        yield ", ".join(f"{name} x {count}" if count > 1 else name for name, count in counted.most_common())


def _sums(nodes: Sequence[Node], snapshot: Snapshot, each: str = "") -> str:
    """`  (58 operators, 1.2 TFLOP, 12.6 MB received)`."""
    operators = [node for node in nodes if node.kind == "operator"]
    parts = [each + count_text(len(operators), "operator")]
    if work := sum(node.flops for node in operators):
        parts.append(flops_text(work))
    ids = [each for node in nodes if node.kind == "exchange" for each in node.exchanges]
    if ids:
        parts.append(f"{bytes_text(sum(snapshot.by_id[each].exact[snapshot.rank] for each in ids))} received")
    return f"  ({', '.join(parts)})"
