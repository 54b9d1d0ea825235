"""What differs between two plans, each as `Plan.describe()` gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .words import bytes_text, count_text

SETTINGS = (
    "ranks",
    "mesh",
    "strategy",
    "target",
    "bound",
    "flops_total",
    "flops_per_rank",
    "state_bytes_per_rank",
    "estimated",
    "uncounted",
)
LISTED = 12  #: so many exchanges of a kind are written out


@dataclass(frozen=True)
class PlanDiff:
    """The differences from one plan to another. It is false if there are none; `str` lists them.

    Attributes:
        settings: (name, old, new) of `ranks`, `strategy`, `bound`, …
        cuts: (name of the value, old layout or None, new layout or None).
        exchanges: (old, new): entries of `Plan.describe()["exchanges"]` of the same operator and role whose bytes or
            reasons differ; None where only one plan has it. Identifiers are those of each plan.
        fallbacks: (old, new) alike, of operators that could not be split.
    """

    settings: tuple[tuple[str, Any, Any], ...]
    cuts: tuple[tuple[str, str | None, str | None], ...]
    exchanges: tuple[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None], ...]
    fallbacks: tuple[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None], ...]

    def __bool__(self) -> bool:
        return any((self.settings, self.cuts, self.exchanges, self.fallbacks))

    def __str__(self) -> str:
        return "\n".join(self._lines()) or "the plans are equal"

    def _lines(self) -> Iterator[str]:
        for name, old, new in self.settings:
            yield f"{name}: {_short(old)} -> {_short(new)}"
        for name, old, new in self.cuts:
            yield f"cut of {name}: {old or 'none'} -> {new or 'none'}"
        added = [new for old, new in self.exchanges if old is None and new is not None]
        removed = [old for old, new in self.exchanges if new is None and old is not None]
        changed = [(old, new) for old, new in self.exchanges if old is not None and new is not None]
        for sign, some in (("+", added), ("-", removed)):
            if some:
                yield f"{count_text(len(some), 'exchange')} {'more' if sign == '+' else 'fewer'}"
            yield from (f"  {sign} {_exchange(each)}" for each in some[:LISTED])
            yield from _rest(some)
        if changed:
            yield f"{count_text(len(changed), 'exchange')} changed"
        for old, new in changed[:LISTED]:
            yield f"  {old['id']} -> {new['id']}  {new['role']} for {new['node']}: {_received(old)} -> {_received(new)}"
        yield from _rest(changed)
        for old, new in self.fallbacks:
            each = new or old
            assert each is not None
            how = "gone" if new is None else "new" if old is None else "changed"
            yield f"fallback {how}: {each['node']}: {each['reason']}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> PlanDiff:
    """The differences from the plan `old` to the plan `new`, both as `Plan.describe()` gives them."""
    settings = tuple((name, old[name], new[name]) for name in SETTINGS if old[name] != new[name])
    names = dict.fromkeys([*old["cuts"], *new["cuts"]])
    cuts = tuple((name, old["cuts"].get(name), new["cuts"].get(name)) for name in names)
    return PlanDiff(
        settings,
        tuple(each for each in cuts if each[1] != each[2]),
        tuple(_paired(old["exchanges"], new["exchanges"], ("received", "received_displaced", "reason"))),
        tuple(_paired(old["fallbacks"], new["fallbacks"], ("shapes", "bytes", "reason"))),
    )


def _paired(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], compared: tuple[str, ...]
) -> Iterator[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """Entries of the same operator and role, in order, that differ in one of the fields `compared`."""
    before, after = _keyed(old), _keyed(new)
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        if a is None or b is None or any(a[name] != b[name] for name in compared):
            yield a, b


def _keyed(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for each in entries:
        key: tuple[Any, ...] = (each["node"], each["path"], each.get("role"), 0)
        while key in found:
            key = (*key[:-1], key[-1] + 1)
        found[key] = each
    return found


def _exchange(each: Mapping[str, Any]) -> str:
    where = f" in {each['path']}" if each["path"] else ""
    return f"{each['id']}  {each['role']} for {each['node']}{where}: {_received(each)}"


def _received(each: Mapping[str, Any]) -> str:
    """Bytes of the rank that receives most, in an exact step and, if they differ, in a displaced one."""
    exact, steady = max(each["received"]), max(each["received_displaced"])
    return bytes_text(exact) if exact == steady else f"{bytes_text(exact)}, then {bytes_text(steady)}"


def _rest(some: Sequence[object]) -> Iterator[str]:
    if len(some) > LISTED:
        yield f"  … {len(some) - LISTED} more"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list) and len(set(value)) == 1 and len(value) > 1:
        return f"{len(value)} x {value[0]}"
    return str(value)
