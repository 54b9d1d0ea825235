"""Layouts, sizes, exchanges and arguments as text.

All functions are pure, from data to text. Sizes are those of one rank; bytes are those that it receives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.layout import Layout, Rows

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
    return (
        f"{sizes} ({letters(len(shape))[layout.dim]}: {layout.sizes[rank % len(layout.rows)]} of {shape[layout.dim]})"
    )


def bytes_text(count: float) -> str:
    """`512 B`, `1.5 kB`, `20.0 MB`, `3.1 GB`; a kB is 1,000 bytes."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if round(count, 1) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def count_text(count: int, what: str) -> str:
    """`1 operator`, `58 operators`."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def flops_text(count: float) -> str:
    """`800 FLOP`, `1.50 kFLOP`, `20.00 GFLOP`, …"""
    for unit in ("", "k", "M", "G", "T"):
        if round(count, 2) < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.2f} {unit}FLOP" if unit else f"{count:.0f} FLOP"


def seconds_text(seconds: float) -> str:
    """`80.0 us`, `1.5 ms`, `2.00 s`."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if round(seconds * scale, 1) < 1000:
            return f"{seconds * scale:.1f} {unit}"
    return f"{seconds:.2f} s"


def cuts_text(rows: Sequence[Rows], size: int) -> str:
    """`64 rows, cut at 16, 32, 48`, or the rows of each rank if the parts overlap or are not contiguous."""
    ends = [part.stop for part in rows if part.runs]
    starts = [part.start for part in rows if part.runs]
    if all(part.contiguous for part in rows) and starts == [0, *ends[:-1]]:
        return f"{size} rows, cut at {', '.join(map(str, ends[:-1]))}"
    return f"{size} rows: {' '.join(map(str, rows))}"


# ------------------------------------------------------------------------------------------------ exchanges


def exchange_text(exchange: Exchange, rank: int) -> str:
    """What a rank, as the exchange counts it, receives: `halo(H: 1 up, 1 down)`, `gather(L: 5 -> 40)`, `moments`."""
    if not isinstance(exchange, Fetch):
        return str(exchange)
    dim = letters(len(exchange.shape))[exchange.dim]
    if exchange.role == "halo":
        return f"halo({dim}: {_halo(exchange, rank)})"
    have, want = len(exchange.have[rank]), len(exchange.want[rank])
    everything = all(len(rows) == exchange.shape[exchange.dim] for rows in exchange.want)
    before, after = exchange.framed(rank)
    frame = f" + {before + after} of {exchange.fill:g}" if before + after else ""
    along = " of all groups" if exchange.axis is not None and exchange.axis.name == "samples" else ""
    return f"{'gather' if everything else 'move'}({dim}: {have} -> {want}{frame}{along})"


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


def value_text(value: Any, name: Callable[[fx.Node], str] = str) -> str:
    """An argument as text; `name` gives the text of an operand."""
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, (list, tuple)):
        shown = [value_text(each, name) for each in value[:LONGEST]]
        more = [f"… {len(value)} in all"] if len(value) > LONGEST else []
        return f"[{', '.join([*shown, *more])}]"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("%", "%%")


def arguments_text(node: fx.Node, operands: Sequence[fx.Node]) -> str:
    """The arguments of a call, with `%0`, `%1` for its operands: `%0, %1, alpha=2`. A per cent sign is `%%`."""
    place = {operand: f"%{i}" for i, operand in enumerate(operands)}
    shown = [value_text(each, place.__getitem__) for each in node.args]
    shown += [f"{key}={value_text(value, place.__getitem__)}" for key, value in node.kwargs.items()]
    return ", ".join(shown)


def filled(arguments: str, operands: Sequence[str]) -> str:
    """`arguments_text` with the names of the operands."""
    return re.sub(r"%(\d+|%)", lambda m: "%" if m[1] == "%" else operands[int(m[1])], arguments)
