"""A plan as HTML, for notebooks: what is cut, and what each rank computes and receives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .words import bytes_text, flops_text


def plan_html(plan: Mapping[str, Any]) -> str:
    """HTML of a plan as `Plan.describe()` gives it, without colours, so that it fits light and dark pages."""
    parts = [
        f"<p><b>{plan['ranks']} ranks, strategy {escape(plan['strategy'])}, target {escape(plan['target'])}</b>: "
        f"{flops_text(plan['flops_total'])}, at most {plan['bound']:.2f} times as fast</p>",
        _table(("cut", "layout"), plan["cuts"].items()),
        _ranks("an exact step", plan["flops_per_rank"], plan["bytes_received_per_rank"]),
    ]
    displaced = plan["bytes_received_per_rank_displaced"]
    if displaced is not None:
        parts.append(_ranks("a displaced step", plan["flops_per_rank"], displaced))
    rows = [
        (", ".join(each["exchanges"]), each["node"], each["path"], bytes_text(each["bytes"]), each["reason"])
        for each in plan["fallbacks"]
    ]
    if rows:
        parts.append(_table(("fallback", "operator", "module", "bytes", "reason"), rows))
    return "\n".join(parts)


def _ranks(title: str, work: Sequence[int], received: Sequence[Mapping[str, int]]) -> str:
    roles = list(dict.fromkeys(role for each in received for role in each))
    rows = [
        (rank, flops_text(count), *(bytes_text(each.get(role, 0)) for role in roles), bytes_text(sum(each.values())))
        for rank, (count, each) in enumerate(zip(work, received, strict=True))
    ]
    return f"<p>{escape(title)}</p>\n" + _table(("rank", "work", *roles, "received"), rows)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
