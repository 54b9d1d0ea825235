"""Graphs as text: one line per operator, grouped by module.

    down_blocks.0.resnets.0.conv1
      getitem_2      [B, C, H/2, W]  1x16x18x16 (H: 18 of 34)  float32  halo(H: 1 down) of silu_1; 1.0 kB
      convolution_1  [B, C, H/2, W]  1x16x16x16 (H: 16 of 32)  float32  convolution(getitem_2, .weight, .bias, …)

All functions are pure, from data to text. Sizes are those of one rank; bytes are those that it receives.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.layout import Layout, Rows
from ..ir.program import Program, layout_of, specialize

LETTERS = {3: "BLC", 4: "BCHW", 5: "BCFHW"}
LONGEST = 8  #: longer lists are cut off after as many elements


def letters(ndim: int) -> list[str]:
    """Names of the dims of a value with `ndim` dims."""
    return list(LETTERS[ndim]) if ndim in LETTERS else [f"D{i}" for i in range(ndim)]


def layout_text(shape: Sequence[int], layout: Layout) -> str:
    """`[B, C, H/4, W]`: split along H, on four ranks."""
    names = letters(len(shape))
    if layout.dim is not None:
        names[layout.dim] += f"/{len(layout.rows)}"
    return f"[{', '.join(names)}]"


def sizes_text(shape: Sequence[int], layout: Layout, rank: int) -> str:
    """`1x16x16x16 (H: 16 of 64)`: the shape of the part on rank `rank`."""
    sizes = "x".join(map(str, layout.local_shape(shape, rank))) or "scalar"
    if layout.dim is None:
        return sizes
    return f"{sizes} ({letters(len(shape))[layout.dim]}: {layout.sizes[rank]} of {shape[layout.dim]})"


def bytes_text(count: float) -> str:
    """`512 B`, `1.5 kB`, `20.0 MB`, `3.1 GB`; a kB is 1,000 bytes."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def flops_text(count: float) -> str:
    """`800 FLOP`, `1.50 kFLOP`, `20.00 GFLOP`, …"""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.2f} {unit}FLOP" if unit else f"{count:.0f} FLOP"


def cuts_text(rows: Sequence[Rows], size: int) -> str:
    """`64 rows, cut at 16, 32, 48`, or the rows of each rank if the parts overlap or are not contiguous."""
    ends = [part.stop for part in rows if part.runs]
    starts = [part.start for part in rows if part.runs]
    if all(part.contiguous for part in rows) and starts == [0, *ends[:-1]]:
        return f"{size} rows, cut at {', '.join(map(str, ends[:-1]))}"
    return f"{size} rows: {' '.join(map(str, rows))}"


# ------------------------------------------------------------------------------------------------ exchanges


def exchange_text(exchange: Exchange, rank: int) -> str:
    """What rank `rank` receives: `halo(H: 1 up, 1 down)`, `gather(L: 512 -> 4096)`, `moments(…)`."""
    if not isinstance(exchange, Fetch):
        return str(exchange)
    dim = letters(len(exchange.shape))[exchange.dim]
    if exchange.role == "halo":
        return f"halo({dim}: {_halo(exchange, rank)})"
    have, want = len(exchange.have[rank]), len(exchange.want[rank])
    everything = all(len(rows) == exchange.shape[exchange.dim] for rows in exchange.want)
    before, after = exchange.framed(rank)
    frame = f" + {before + after} of {exchange.fill:g}" if before + after else ""
    return f"{'gather' if everything else 'move'}({dim}: {have} -> {want}{frame})"


def _halo(exchange: Fetch, rank: int) -> str:
    have, missing = exchange.have[rank], exchange.want[rank] - exchange.have[rank]
    first, last = (have.start, have.stop) if have.runs else (0, 0)
    up = len(missing & Rows.interval(0, first))
    down = len(missing & Rows.interval(last, exchange.shape[exchange.dim]))
    before, after = exchange.framed(rank)
    fill = "zero" if exchange.fill == 0 else f"of {exchange.fill:g}"
    parts = [
        f"{count} {where}"
        for count, where in (
            (up, "up"),
            (len(missing) - up - down, "between"),
            (down, "down"),
            (before, f"{fill} up"),
            (after, f"{fill} down"),
        )
        if count
    ]
    return ", ".join(parts) or "nothing"


# ------------------------------------------------------------------------------------------------ operators


def operator_text(target: Any) -> str:
    """`add`, `convolution`, `take`."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return getattr(target, "__name__", str(target))


def value_text(value: Any, names: Mapping[str, str], path: str = "") -> str:
    """An argument as text; weights of the module `path` are `.weight`, `.bias`."""
    if isinstance(value, fx.Node):
        name = names.get(value.name, value.name)
        return name[len(path) :] if path and name.startswith(f"{path}.") else name
    if isinstance(value, (list, tuple)):
        shown = [value_text(each, names, path) for each in value[:LONGEST]]
        more = [f"… {len(value)} in all"] if len(value) > LONGEST else []
        return f"[{', '.join([*shown, *more])}]"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    return f"{value:g}" if isinstance(value, float) else str(value)


def call_text(node: fx.Node, names: Mapping[str, str]) -> str:
    """`add(a, b, alpha=2)`."""
    path = node.meta.get("path", "")
    shown = [value_text(each, names, path) for each in node.args]
    shown += [f"{key}={value_text(value, names, path)}" for key, value in node.kwargs.items()]
    return f"{operator_text(node.target)}({', '.join(shown)})"


def _placed(node: fx.Node, rank: int) -> str:
    """Layout, sizes and dtype of a node's value; empty for an operator with several results."""
    if "shape" not in node.meta:
        return ""
    shape, layout = node.meta["shape"], layout_of(node)
    dtype = str(node.meta["dtype"]).removeprefix("torch.")
    return f"{layout_text(shape, layout)}  {sizes_text(shape, layout, rank)}  {dtype}  "


def _exchange_lines(node: fx.Node, names: Mapping[str, str], rank: int) -> Iterator[str]:
    """One line per value of an exchange, under the name of its result in the graph."""
    values, declared = node.args
    awaited = next((user for user in node.users if user.target is ops.wait), node)
    results = {user.args[1]: user for user in awaited.users if user.target is operator.getitem}
    if len(declared) > 1:  # type: ignore[arg-type]
        size = bytes_text(sum(each.received(rank) for each in declared))  # type: ignore[union-attr]
        yield f"{node.name}  one message of {len(declared)} values; {size}"  # type: ignore[arg-type]
    for i, (value, each) in enumerate(zip(values, declared, strict=True)):  # type: ignore[arg-type]
        source = value_text(value, names)
        name, placed = (results[i].name, _placed(results[i], rank)) if i in results else ("(unused)", "")
        reason = f"; because {each.reason}" if each.reason else ""
        text = exchange_text(each, rank)
        stale = "" if each.fresh == "sync" else f"{each.fresh} "
        role = "" if text.startswith(f"{each.role}(") else f" for {each.role}"
        later = each.wire.received(rank) if each.repeated else 0
        changes = f" in changes of {each.bits} bits" if isinstance(each, Fetch) and each.bits else ""
        less = f", then {bytes_text(later)}{changes}" if each.fresh != "sync" and later != each.received(rank) else ""
        yield f"{name}  {placed}{stale}{text} of {source}{role}; {bytes_text(each.received(rank))}{less}{reason}"


# --------------------------------------------------------------------------------------------------- graphs


def graph_text(program: Program, graph: fx.Graph, rank: int = 0) -> str:
    """The graph of rank `rank`: inputs, a line about the weights, operators by module, and outputs.

    `program` names the placeholders of `graph`, which may be the captured graph or a partitioned one.
    """
    local = specialize(graph, rank)
    names = program.weights | dict(zip(program.inputs, program.input_paths, strict=True))
    placeholders = [node for node in local.nodes if node.op == "placeholder"]
    lines = ["inputs"]
    lines += [f"  {names[n.name]}  {_placed(n, rank)}".rstrip() for n in placeholders if n.name in program.inputs]
    weights = [n for n in placeholders if n.name in program.weights]
    constants = [n for n in placeholders if n.name in program.constants]
    for what, nodes in (("weights", weights), ("constants", constants)):
        size = sum(n.meta["dtype"].itemsize * torch.Size(n.meta["shape"]).numel() for n in nodes)
        lines += [f"{what}: {len(nodes)}, {bytes_text(size)}"] if nodes else []
    path = None
    for node in local.nodes:
        if node.op == "placeholder" or (
            node.target is operator.getitem and node.args[0].target in (ops.exchange, ops.wait)
        ):
            continue
        if node.op == "output":
            lines += ["outputs", *(f"  {value_text(value, names)}" for value in node.args[0])]
            continue
        if node.meta.get("path", "") != path:
            path = node.meta.get("path", "")
            lines.append(path or "(the model itself)")
        if node.target is ops.exchange:
            lines += [f"  {line}" for line in _exchange_lines(node, names, rank)]
        elif node.target is ops.wait:
            lines.append(f"  {', '.join(user.name for user in node.users)}  arrived")
        else:
            lines.append(f"  {node.name}  {_placed(node, rank)}{call_text(node, names)}")
    return "\n".join(lines)


def cut_values_text(program: Program, graph: fx.Graph, cuts: Mapping[str, Layout]) -> list[tuple[str, str, str]]:
    """(value that is split, its layout, positions of the cuts) for each cut value."""
    nodes = {node.name: node for node in graph.nodes}
    paths = dict(zip(program.inputs, program.input_paths, strict=True))
    rows = []
    for name, layout in cuts.items():
        inside = nodes[name].meta.get("path", "")
        shape = nodes[name].meta["shape"]
        label = paths.get(name) or (f"{name} in {inside}" if inside else name)
        rows.append((label, layout_text(shape, layout), cuts_text(layout.rows, shape[layout.axis])))
    return rows
