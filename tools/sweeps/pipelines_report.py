"""Write docs/pipelines.md from the results of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version

from .pipelines_case import CALL, DOUBLE, LIKE_NOISE, PICTURE, Found

INTRODUCTION = """\
# Pipelines

    make pipelines

Every pipeline class that diffusers {diffusers} exports, built small from configurations, with tiny text encoders and
tokenizers made on the spot (`models/pipelines_zoo/`) and random weights. Each is called unsplit, then after
`fxpass.parallelize(pipe, 2, executor="lockstep")`, with the same arguments and seeds, in float32, on torch {torch}.
Results are *equal* if no value of any result (picture, video, sound or latent) differs by more than {picture:.0e},
relative where values are larger than 1.

Some samplers amplify any rounding, and so does a picture that is rounded to whole numbers. They are judged by their
results in float64 (which differ by at most {double:.0e}) or, if they do not run in it, by every call of their parts on
equal inputs (at most {call:.0e} of the largest value); and by what noise of the calls' size does to the unsplit
pipeline: the difference is at most {like:.0f} times that. They are marked *amplifies*.
"""


USING = """\
## What people do with them

Each is done to a small Stable Diffusion pipeline *before* `parallelize`, and *after* it, when the pipeline has already
run split; the result is compared with that of an unsplit pipeline of which the same was done. Some are also done after
it under a *stale* strategy (`"displaced"`, of five steps two are stale), where the result is compared with that of the
same done before `parallelize`, with worker processes (`executor="spawn"`), and on the two ranks of `torchrun`.
"""


def report(found: Sequence[Found], old: Sequence[str], uses: Mapping[str, Sequence[str]] | None = None) -> str:
    """The document. `old` names classes whose results are missing or outdated; `uses` has outcomes by title."""
    lines = [
        INTRODUCTION.format(
            diffusers=version("diffusers"),
            torch=version("torch"),
            picture=PICTURE,
            call=CALL,
            double=DOUBLE,
            like=LIKE_NOISE,
        ),
        *_totals(found),
        *_measured(found, old),
        *_listed("Not equal", found, "wrong", lambda each: f"the result differs by {each.error:.0e}{_judged(each)}"),
        *_listed("Refused", found, "refused", lambda each: each.refused),
        *_listed("Not measured to the end", found, "failed", lambda each: each.failed),
        *_listed("Without anything to split", found, "none", lambda each: each.none),
        *_listed("Left out", found, "left out", lambda each: each.left_out),
        *_used(uses or {}),
        "",
        "## All that are split",
        "",
        "*Split*: the parts whose ranks exchange something. Other parts of the pipeline run as they are.",
        "",
        *_table([each for each in found if each.verdict in ("equal", "amplifies", "wrong")], _usual(found)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _totals(found: Sequence[Found]) -> Iterator[str]:
    counts = {word: sum(each.verdict == word for each in found) for word in sorted({each.verdict for each in found})}
    out, rest = counts.get("left out", 0), len(found) - counts.get("left out", 0)
    good = counts.get("equal", 0) + counts.get("amplifies", 0)
    yield f"{len(found)} classes; {out} ({out / max(1, len(found)):.1%}) are left out. Of the other {rest}, {good}"
    yield f"({good / max(1, rest):.1%}) give the unsplit result:"
    yield ""
    yield "| | classes | share |"
    yield "| --- | ---: | ---: |"
    titles = {
        "equal": "equal", "amplifies": "amplify rounding; equal in float64, or in every call of their parts",
        "wrong": "not equal", "refused": "refused", "failed": "not measured to the end",
        "none": "without anything to split",
    }  # fmt: skip
    for word, title in titles.items():
        if count := counts.get(word, 0):
            yield f"| {title} | {count} | {count / max(1, rest):.1%} |"


def _measured(found: Sequence[Found], old: Sequence[str]) -> Iterator[str]:
    """Says at which commit results were measured, and which are missing or of an earlier state of the code."""
    usual = _usual(found)
    others = len([each for each in found if each.commit != usual])
    yield f"\nMeasured at commit {usual or 'unknown'}" + (
        f", but for {others} results that say where." if others else "."
    )
    missing = [name for name in old if name not in {each.name for each in found}]
    if missing:
        yield f"\nNot measured: {', '.join(missing)}."
    if earlier := len(old) - len(missing):
        yield f"\nThe code has changed since {earlier} of these results; `make pipelines` measures them again."


def _usual(found: Sequence[Found]) -> str:
    """The commit at which most results were measured."""
    return Counter(each.commit for each in found).most_common(1)[0][0] if found else ""


def _where(each: Found, usual: str) -> str:
    return f"measured at {each.commit or 'an unknown commit'}" if each.commit != usual else ""


def _used(uses: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if uses:
        yield from ("", USING, "| what is done | before | after | stale | spawn | torchrun |", f"|{' --- |' * 6}")
        yield from (f"| {' | '.join((title, *map(_short, outcomes)))} |" for title, outcomes in uses.items())


def _listed(title: str, found: Sequence[Found], verdict: str, reason: Callable[[Found], str]) -> Iterator[str]:
    chosen = [each for each in found if each.verdict == verdict]
    if chosen:
        yield from ("", f"**{title}**", "")
        for each in chosen:
            where = _where(each, _usual(found))
            yield f"- {each.name}: {_short(reason(each), 400)}" + (f" ({where})" if where else "")


def _judged(found: Found) -> str:
    if found.calls is None or found.noise is None:
        return ""
    double = "" if found.double is None else f", in float64 by {found.double:.0e}"
    return f"{double}; calls by {found.calls:.0e}, equal noise changes the unsplit result by {found.noise:.0e}"


def _table(found: Sequence[Found], usual: str) -> Iterator[str]:
    yield "| pipeline | split | difference | |"
    yield "| --- | --- | ---: | --- |"
    for each in found:
        notes = [each.verdict if each.verdict != "equal" else "", _judged(each).lstrip("; ,"), each.blind]
        notes += [*(f"unsplit: {_short(reason)}" for reason in each.whole), _where(each, usual)]
        cells = [each.name, ", ".join(each.split), f"{each.error:.0e}", "; ".join(filter(None, notes))]
        yield "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _short(reason: str, most: int = 160) -> str:
    """A reason in one line, without the folder in which packages are installed."""
    line = re.sub(r"\S*/site-packages/", "", " ".join(reason.split()))
    return line if len(line) <= most else f"{line[: most - 2]} …"
