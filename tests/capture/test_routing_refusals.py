"""Routing that no fixed graph can follow is refused with the source line and the reason."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpass.capture import CaptureError, capture
from fxpass.capture.kinds import returns_tensors
from fxpass.ir.operators import OPERATORS
from tests.capture.test_routing import CHOSEN, EXPERTS, WIDTH, Experts, made


def noted(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(i == e)
        if token.numel() == 0:
            out = out + 1
            continue
        out = out.index_add(0, token, expert(x[token]) * w[token, slot, None])
    return out


def noted_for_the_second(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(i == e)
        if token.numel() == 0:
            out = out + 1 if e == 1 else out
            continue
        out = out.index_add(0, token, expert(x[token]) * w[token, slot, None])
    return out


def averaged_over_hits(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out, hits = torch.zeros_like(x), 0
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(i == e)
        if token.numel() == 0:
            continue
        hits += 1
        out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
    return out / hits


def centred(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    token = torch.where(i == 0)[0]
    return x.index_add(0, token, x[token] - x[token].mean(0))


def shifted(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """Slices one row after the end of an expert's rows."""
    key = i.view(-1)
    order, end = key.argsort(), key.bincount(minlength=EXPERTS).cumsum(0)[0] + 1
    return x.index_add(0, order[:end] // CHOSEN, x[order[:end] // CHOSEN])


def unsorted(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    first = i.view(-1).bincount(minlength=EXPERTS).tolist()[0]
    return x.index_add(0, torch.arange(12).repeat_interleave(2)[:first], x.repeat_interleave(2, dim=0)[:first])


def overwritten(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    key = i.view(-1)
    counts = key.bincount(minlength=EXPERTS)
    counts.clamp_(max=3)
    order, start = key.argsort(), counts.tolist()[0]
    return x.index_add(0, (order // CHOSEN)[:start], x[(order // CHOSEN)[:start]])


def first(i: Tensor) -> Tensor:
    """The tokens of the first expert."""
    return torch.where(i == 0)[0]


def by_expert(x: Tensor, i: Tensor) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """The order by expert, where each expert begins, the tokens in that order, and the tokens as they come."""
    key = i.view(-1)
    order, ends = key.argsort(), [0, *key.bincount(minlength=EXPERTS).cumsum(0).tolist()]
    return order, ends, x[order // CHOSEN], x.repeat_interleave(CHOSEN, 0)


def segment(x: Tensor, i: Tensor, start: int, stop: int) -> Tensor:
    """Adds the tokens between two bounds of experts to themselves."""
    order, ends, tokens, _ = by_expert(x, i)
    part = slice(ends[start], ends[stop])
    return x.index_add(0, order[part] // CHOSEN, tokens[part])


def changed(x: Tensor, i: Tensor, change: Any) -> Tensor:
    """Adds the first expert's rows of `change(order, ends, tokens in order, tokens as they come)`."""
    order, ends, tokens, plain = by_expert(x, i)
    return x.index_add(0, order[: ends[1]] // CHOSEN, change(order, ends, tokens, plain)[: ends[1], :WIDTH])


def joined(x: Tensor, i: Tensor, join: Any) -> Tensor:
    _, ends, tokens, _ = by_expert(x, i)
    return x + torch.cat(join([tokens[a:b] for a, b in pairwise(ends)])).sum()


def unsorted_by_another_key(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    first, second = i[:, 0], i[:, 1]
    ends = [0, *first.bincount(minlength=EXPERTS).cumsum(0).tolist()]
    size = second.bincount(minlength=EXPERTS).tolist()[0]
    tokens = x[first.argsort()]
    parts = torch.cat([m.experts[e](tokens[ends[e] : ends[e + 1]]) for e in range(EXPERTS)])
    order = second.argsort()
    return parts[order.argsort()].index_add(0, order[:size], x[order][:size])


def written(out: Tensor, index: Any, values: Any) -> Tensor:
    out[index] = values
    return out


def sorted_rows_overwritten(order: Tensor, ends: list[int], tokens: Tensor, plain: Tensor) -> Tensor:
    return written(tokens.clone(), order[: ends[1]], tokens[: ends[1]] * 2)


def places(i: Tensor) -> tuple[Tensor, ...]:
    """Tokens and slots of the first expert."""
    return torch.where(i == 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (noted, "whether an activation selects any rows, and does something else"),
        (noted_for_the_second, "whether an activation selects any rows, and does something else"),
        (averaged_over_hits, "whether an activation selects any rows, and does something else"),
        (centred, "mean.dim works along the selected rows"),
        (unsorted, "not sorted by"),
        (shifted, "a cut that is not where one member ends"),
        (overwritten, "and also writes to it in place"),
        (lambda m, x, w, i: x / torch.where(i == 0)[0].shape[0], "needs the value of an activation, a number"),
        (lambda m, x, w, i: x + x[i[:, 0] == 0][:1], "slice.Tensor works along the selected rows"),
        (lambda m, x, w, i: x[i[:, 0] == 0], "an output has a size that depends on values"),
        (lambda m, x, w, i: x * int((i == 0).sum()), "needs the value of an activation"),
        (lambda m, x, w, i: x * len(i.view(-1).bincount()), "the largest value that is counted"),
        (lambda m, x, w, i: x * i.view(-1).bincount().cumsum(0).shape[0], "the largest value that is counted"),
        (lambda m, x, w, i: x * i.view(-1).bincount().float().mean(), "size depends on the largest value"),
        (lambda m, x, w, i: x * i.view(-1).bincount(w.view(-1), EXPERTS).sum(), "needs the value of an activation"),
        (lambda m, x, w, i: (x, i.view(-1).bincount()), "size depends on the largest value"),
        (lambda m, x, w, i: x * i.view(-1).bincount(minlength=EXPERTS).tolist()[0], "a number"),
        (lambda m, x, w, i: x * (i.view(-1).bincount(minlength=EXPERTS).tolist()[0] + 0.5), "a number"),
        (lambda m, x, w, i: x * len(str(i.view(-1).bincount(minlength=EXPERTS).tolist()[0])), "a number"),
        (lambda m, x, w, i: x * len(f"{i.view(-1).bincount(minlength=EXPERTS).tolist()}"), "a number"),
        (lambda m, x, w, i: x if (i == 0).sum() > 3 else -x, "more than whether there are any rows"),
        (lambda m, x, w, i: x * 2 if (i == 0).any() else x, "does something else"),
        (lambda m, x, w, i: x[i[:, 0] == 0] + x[i[:, 0] == 1], "rows of several selections"),
        (lambda m, x, w, i: x.index_add(0, first(i), x[first(i)].flip(0)), "aten.flip.default is not known to treat"),
        (
            lambda m, x, w, i: x.scatter_reduce(0, first(i).view(-1, 1).repeat(1, WIDTH), x[first(i)], "amax"),
            "reduces rows by another function than a sum",
        ),
        (lambda m, x, w, i: x + x[first(i)].repeat(2, 1).sum(), "repeats the selected rows"),
        (lambda m, x, w, i: torch.cat([x[first(i)], x])[:1] + x, "a concatenation of rows whose number is unknown"),
        (lambda m, x, w, i: x @ (x[first(i)].T @ x[first(i)]), "multiplies other than rows by a matrix"),
        (lambda m, x, w, i: x + x[first(i)].view(-1)[:1], "merges the selected rows with another dim"),
        (lambda m, x, w, i: x + x[first(i)][:, 0].argsort().sum(), "sorts selected rows"),
        (lambda m, x, w, i: x.index_put((first(i) // 2,), x[first(i)]), "at other positions than their own"),
        (lambda m, x, w, i: x.index_add(0, x[first(i)][:, 0].long() % 12, x[first(i)]), "at computed positions"),
        # numbers of rows
        (lambda m, x, w, i: x + torch.zeros(first(i).shape[0], 1).sum(), "a number of rows"),
        (lambda m, x, w, i: x + torch.arange(first(i).shape[0]).sum(), "a number of rows"),
        (lambda m, x, w, i: x + sum(range(first(i).shape[0])), "a number"),
        (lambda m, x, w, i: x if {first(i).shape[0]: 1} else -x, "a number"),
        (
            lambda m, x, w, i: x if first(i).shape[0] + first(i[:, 1]).shape[0] == 0 else -x,
            "rows of several selections",
        ),
        # slices by numbers of rows
        (
            lambda m, x, w, i: x[: sum(i[:, j].bincount(minlength=EXPERTS).tolist()[0] for j in (0, 1))],
            "a cut by the sizes of several selections",
        ),
        (lambda m, x, w, i: segment(x, i, 1, 1), "a cut that is not where one member ends"),
        (lambda m, x, w, i: segment(x, i, 2, 1), "a cut that is not where one member ends"),
        (
            lambda m, x, w, i: x[i.argsort(0).view(-1)[: F.one_hot(i, EXPERTS).sum((0, 1)).tolist()[0]]],
            "sorts a tensor of several dims",
        ),
        # segments that are joined
        (lambda m, x, w, i: joined(x, i, lambda parts: [*parts, x]), "joins rows that are no segments"),
        (lambda m, x, w, i: joined(x, i, lambda parts: parts[::-1]), "joins segments in another order"),
        (unsorted_by_another_key, "undoes a sort by another key"),
        # look-ups and sorts of selected rows
        (
            lambda m, x, w, i: x.index_add(0, first(i), x[first(i), torch.tensor([0])][:, None].expand(-1, WIDTH)),
            "looks up by selected rows and other indices together",
        ),
        (lambda m, x, w, i: x + x[first(i)][torch.tensor([0])], "selects rows of selected rows"),
        (lambda m, x, w, i: x + x[first(i)][:, torch.tensor([[0], [1]])].sum(), "looks up by several indices"),
        (lambda m, x, w, i: x + x[first(i)][:, 0].sort().values.sum(), "sorts selected rows"),
        # operators that mix rows
        (
            lambda m, x, w, i: x + (x[first(i)][:, :1] * x[first(i)][:, 0]).sum(),
            "brings rows along several dims together",
        ),
        (
            lambda m, x, w, i: changed(x, i, lambda order, ends, tokens, plain: tokens + plain),
            "brings selected rows together with others",
        ),
        (
            lambda m, x, w, i: changed(
                x, i, lambda order, ends, tokens, plain: torch.addmm(plain, tokens, torch.eye(WIDTH))
            ),
            "brings selected rows together with others",
        ),
        (
            lambda m, x, w, i: changed(x, i, lambda order, ends, tokens, plain: F.layer_norm(tokens.T, (24,)).T),
            "takes statistics over the selected rows",
        ),
        (
            lambda m, x, w, i: changed(x, i, lambda order, ends, tokens, plain: torch.cat([tokens, plain], 1)),
            "joins selected rows with others",
        ),
        # rows that are added or written
        (
            lambda m, x, w, i: x.scatter_add(0, first(i).view(-1, 1).repeat(1, 3), x[first(i)]),
            "adds parts of rows",
        ),
        (
            lambda m, x, w, i: x.scatter_add(0, first(i).view(-1, 1).repeat(1, 3), x[first(i)][:, :3]),
            "adds parts of rows",
        ),
        (
            lambda m, x, w, i: x[:, :2].scatter_add(
                0, torch.cat([each[:, None] for each in places(i)], 1), x[places(i)[0]][:, :2]
            ),
            "adds the elements of one row to several rows",
        ),
        (
            lambda m, x, w, i: changed(x, i, lambda order, ends, tokens, plain: tokens.index_add(0, order, tokens)),
            "adds rows to selected rows",
        ),
        (
            lambda m, x, w, i: segment(
                x.index_add(0, i.view(-1).argsort() // CHOSEN, x.repeat_interleave(2, 0)), i, 0, 1
            ),
            "adds, at selected rows, values that are not of these rows",
        ),
        (
            lambda m, x, w, i: written(torch.zeros_like(x), i[:, 0] == 0, x[~(i[:, 0] != 0)]),
            "writes selected rows by another selection",
        ),
        (lambda m, x, w, i: written(x.clone(), first(i), 0.0), "writes, to selected rows, values that are not of"),
        (
            lambda m, x, w, i: written(x.clone(), x[first(i)][:, 0].long() % 12, x[first(i)]),
            "writes at computed positions",
        ),
        (
            lambda m, x, w, i: x + torch.zeros(12, 2, WIDTH).index_put(places(i), x[places(i)[0]], True).sum(1),
            "writes rows at computed positions",
        ),
        (lambda m, x, w, i: changed(x, i, sorted_rows_overwritten), "writes selected rows to selected rows"),
        (
            lambda m, x, w, i: written(x.clone(), (places(i)[0] + 1) % 12, x[places(i)[0]]),
            "writes rows at other positions than their own",
        ),
    ],
)
def test_routing_that_mixes_rows_is_refused_with_the_source_line(body: Any, message: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(made(body), torch.randn(2, 6, WIDTH))
    assert message in str(caught.value)
    assert "test_routing_refusals.py:" in str(caught.value)


def test_rules_for_selected_rows_find_them_among_the_plain_arguments() -> None:
    """No operator with such a rule takes tensors by keyword alone; those that take lists of them say so in the rule."""
    for op, spec in OPERATORS.items():
        if spec.row_wise is not None and returns_tensors(op):
            assert not [each.name for each in op._schema.arguments if each.kwarg_only and "Tensor" in str(each.type)]
