"""narrow: limit attention at displaced steps to the own tokens and the nearest share of each neighbour's (PCPP).

Only that share is sent, from neighbour to neighbour: it is the `window` of the fetch of keys and values. Exact steps
see all tokens. A window needs keys with the same layout as the queries, as self-attention of a split sequence has. All
ranks see the tokens beside the image (text in the same sequence).

Wang et al., "PCPP: Partially Conditioned Patch Parallelism for Accelerated Diffusion Model Inference" (2024).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import TypeGuard

import numpy as np
import torch
from torch import fx

from ..ir import ops
from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.layout import Rows, owned, per_rank
from ..ir.nodes import copied
from ..ir.program import exchanges_of, layout_of, shape_of

WITHOUT = "fetched without a window"  #: how the reasons of such keys and values begin
attention = torch.ops.aten.scaled_dot_product_attention.default


def narrow(graph: fx.Graph, windows: Sequence[float]) -> fx.Graph:
    """A copy of `graph` in which keys and values have windows, or a reason for having none.

    Local ones have a window of the own tokens alone. Where they can have none, they are frozen.

    Args:
        windows: the share of each neighbour's tokens, for equal parts of the depth, first to last; empty: all tokens.
    """
    if not windows and not any(_local(each) for _, declared in exchanges_of(graph) for each in declared):
        return graph
    graph = copied(graph)
    layers = []
    for node in graph.nodes:
        if node.target is ops.exchange:
            _set_reason(node, range(len(node.args[1])), "they are not read by torch's attention operator")
        elif node.target is attention and (why := _reason_against(node)):
            for operand in filter(_fetch, node.args[1:3]):
                _set_reason(operand.args[0], [operand.args[1]], why)
        elif node.target is attention:
            layers.append(node)
    for depth, node in enumerate(layers):
        share = windows[depth * len(windows) // len(layers)] if windows else 0.0
        rows: tuple[Rows, ...] = ()
        for operand in node.args[1:3]:
            rows = _set_window(operand, share)
        mask = node.args[3] if len(node.args) > 3 else None
        if isinstance(mask, fx.Node) and shape_of(mask)[-1] > 1:
            with graph.inserting_before(node):
                seen = graph.call_function(ops.seen, (mask, node.args[1], per_rank(rows)))
                seen.meta = dict(mask.meta) | {"resized": True}
            node.update_arg(3, seen)
    for node, declared in exchanges_of(graph):
        frozen = tuple(replace(each, fresh="frozen") if _local(each) and not each.window else each for each in declared)
        node.update_arg(1, frozen)  # pyright: ignore[reportArgumentType]
    return graph


def _reason_against(node: fx.Node) -> str:
    """Why this attention can have no window; empty if it can."""
    query, *keys_values = node.args[:3]
    fetches = [_fetch(operand) for operand in keys_values]
    mask = node.args[3] if len(node.args) > 3 else None
    at = layout_of(query)  # type: ignore[arg-type]
    if not all(set(operand.users) == {node} for operand in keys_values):
        return "another operator reads them, too"
    if at.dim != len(shape_of(query)) - 2 or not all(f and f.have == at.rows and not f.before for f in fetches):  # type: ignore[arg-type]
        return "their layout differs from that of the queries"
    # a mask may hide the whole window; a causal one never hides a token from itself
    return "" if mask is None or mask.target is ops.causal_mask else "the attention is masked"


def _set_reason(node: fx.Node, places: Iterable[int], why: str) -> None:
    """Say why the stale keys and values that `node` fetches have no window."""
    declared: list[Exchange] = list(node.args[1])  # type: ignore[arg-type]
    for i in places:
        each = declared[i]
        if each.role == "keys_values" and each.fresh in ("stale", "local") and isinstance(each, Fetch):
            declared[i] = replace(each, reason=f"{WITHOUT}: {why}")
    node.update_arg(1, tuple(declared))  # pyright: ignore[reportArgumentType]


def _fetch(operand: object) -> Fetch | None:
    """The exchange whose result the operand is, if it fetches stale or local keys and values."""
    if not isinstance(operand, fx.Node) or operand.target is not operator.getitem:
        return None
    source, index = operand.args
    if source.target is not ops.exchange:
        return None
    found: Exchange = source.args[1][index]  # type: ignore[union-attr,index]
    return (
        found
        if isinstance(found, Fetch) and found.role == "keys_values" and found.fresh in ("stale", "local")
        else None
    )


def _local(each: Exchange) -> TypeGuard[Fetch]:
    return each.fresh == "local" and each.role == "keys_values" and isinstance(each, Fetch)


def _set_window(operand: fx.Node, share: float) -> tuple[Rows, ...]:
    source, index = operand.args
    declared: list[Fetch] = list(source.args[1])  # type: ignore[union-attr,arg-type]
    fetch = declared[index]  # type: ignore[index]
    window = fetch.have if fetch.fresh == "local" else windows_of(fetch.have, share)
    declared[index] = replace(fetch, window=window, reason="")  # type: ignore[index]
    source.update_arg(1, tuple(declared))  # type: ignore[union-attr]
    operand.meta["resized"] = True
    return window


def windows_of(have: tuple[Rows, ...], share: float) -> tuple[Rows, ...]:
    """The tokens that each rank sees: its own, and the nearest `share` of each neighbour's.

    Without the positions that all ranks hold, the sequence consists of segments in which each rank appears once: the
    frames of a video, or text and image. Segments of the most common length get a window; others are seen whole.
    """
    owners = owned(have)
    size = max(rows.stop for rows in have if rows.runs)
    owner = np.full(size, -1)
    for rank, rows in enumerate(owners):
        owner[rows.array] = rank
    everywhere = have[0]
    for rows in have[1:]:
        everywhere = everywhere & rows
    owner[everywhere.array] = -1
    at = np.flatnonzero(owner >= 0)  # positions that are split
    segments = np.split(at, np.flatnonzero(np.diff(owner[at]) < 0) + 1)
    lengths, counts = np.unique([len(s) for s in segments], return_counts=True)
    common = lengths[np.argmax(lengths * counts)]
    result = []
    for rank, rows in enumerate(have):
        seen = [rows.array]
        for segment in segments:
            if len(segment) != common:
                seen.append(segment)
                continue
            mine = np.intersect1d(segment, rows.array)
            for other in (rank - 1, rank + 1):
                theirs = segment[owner[segment] == other]
                seen.append(_nearest(theirs, mine, ceil(share * len(theirs))))
        result.append(Rows.of(np.unique(np.concatenate(seen))))
    return tuple(result)


def _nearest(theirs: np.ndarray, mine: np.ndarray, count: int) -> np.ndarray:
    """The `count` positions of `theirs` with the smallest distance to `mine`; all of them if `mine` is empty."""
    if not len(mine) or not len(theirs):
        return theirs
    after = np.searchsorted(mine, theirs)
    distance = np.minimum(
        np.abs(theirs - mine[np.minimum(after, len(mine) - 1)]), np.abs(theirs - mine[np.maximum(after - 1, 0)])
    )
    return theirs[np.argsort(distance, kind="stable")[:count]]
