"""Write docs/coverage.md from the results of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version

from .zoo_case import RANKS, TOLERANCE, VISIBLE, Found

FOLDERS = {
    "unets": "UNets",
    "transformers": "Transformers",
    "controlnets": "ControlNets",
    "autoencoders": "Autoencoders",
}
INTRODUCTION = """\
# Coverage

    make zoo

Small models of every denoiser, ControlNet and autoencoder class of diffusers {diffusers} (`models/zoo/`), with random
parameters, captured with one set of inputs and run in lockstep with another, in float32, on torch {torch}. A case is
exact if no output of any rank differs from the unsplit model's by more than {tolerance:.0e} of its largest value.
"""
COLUMNS = """
Columns: captured *operators*, and in brackets the number of input values that the model reads as Python numbers (they
are guarded); the largest relative *difference* on {ranks} ranks; the *bound* on the speed-up: the work of the whole
model over that of the busiest rank (these models are tiny: 32 rows, few channels); *kB* that the busiest rank receives
in one exact step; the difference of a *displaced* step on unchanged input; the error of the split model in *bf16* over
that of the unsplit one, both against float32.
"""


def report(found: Sequence[Found], old: Sequence[str]) -> str:
    """The document. `old` names cases whose results are missing or outdated."""
    lines = [
        INTRODUCTION.format(diffusers=version("diffusers"), torch=version("torch"), tolerance=TOLERANCE),
        *_totals(found),
        *([f"\nNot measured since the last change: {', '.join(old)}."] if old else []),
        *_notes("What failed", found, _failures),
        *_notes("What is refused", found, _refusals),
        *_notes("What is gathered", found, _fallbacks),
        *_notes("Inputs whose values models read", found, _read),
        COLUMNS.format(ranks=_slashes(map(str, RANKS))),
    ]
    folders = [*FOLDERS, *sorted({each.folder for each in found} - set(FOLDERS))]
    for folder in folders:
        cases = sorted((each for each in found if each.folder == folder), key=lambda each: (each.kind, each.name))
        if cases:
            lines += ["", f"## {FOLDERS.get(folder, folder or 'Others')}", "", *_table(cases)]
    return "\n".join(lines).rstrip() + "\n"


def _totals(found: Sequence[Found]) -> Iterator[str]:
    kinds = {each.kind for each in found if each.kind}

    def share(title: str, holds: Callable[[Found], bool], of: set[str] = kinds) -> str:
        count = len({each.kind for each in found if each.kind in of and holds(each)})
        return f"| {title} | {count} | {count / max(1, len(of)):.1%} |"

    whole = {kind for kind in kinds if all(_is_exact(each) for each in found if each.kind == kind)}
    in_bf16 = {each.kind for each in found if each.bf16 is not None}
    moved = {each.kind for each in found if each.displaced is not None}
    yield f"{len(found)} cases of {len(kinds)} classes.\n"
    yield "| | classes | share |\n| --- | ---: | ---: |"
    yield share(f"exact at {_slashes(map(str, RANKS))} ranks in every case", lambda each: each.kind in whole)
    yield share("wrong on some number of ranks", _is_wrong)
    yield share("refused in some case", lambda each: bool(_refusals(each)))
    yield share("gathered in part (fallbacks) in some case", lambda each: bool(_fallbacks(each)))
    yield share("not measured", lambda each: bool(each.failed))
    yield share(
        "displaced step equal to the exact one on unchanged input, of those that are split",
        lambda each: each.kind not in {e.kind for e in found if e.displaced is not None and e.displaced > TOLERANCE},
        moved,
    )
    yield share(
        "bf16 error at most twice the unsplit model's, of those that run in bf16",
        lambda each: each.kind not in {e.kind for e in found if e.bf16 is not None and not e.bf16 <= 2},
        in_bf16,
    )


def _is_exact(each: Found) -> bool:
    return bool(each.splits) and all(split.exact for split in each.splits.values())


def _is_wrong(each: Found) -> bool:
    return any(not split.refused and not split.exact for split in each.splits.values())


def _failures(each: Found) -> Iterator[str]:
    if each.failed:
        yield each.failed
    for n, split in each.splits.items():
        if not split.refused and not split.exact:
            yield f"wrong by {split.error:.0e} on {n} ranks"
    if each.displaced is not None and not each.displaced <= TOLERANCE:
        yield f"displaced step off by {each.displaced:.0e} on unchanged input"
    if each.bf16 is not None and not each.bf16 <= 2:
        yield f"{each.bf16:.1f} times the unsplit model's error in bf16"
    yield from (f"a blind test: {reason}" for reason in each.blind)
    if each.splits and not (each.change > VISIBLE and each.scale > 0):
        yield f"other inputs change an output by no more than {each.change:.0e}: a blind test"


def _refusals(each: Found) -> list[str]:
    reasons = [each.refused] if each.refused else []
    return reasons + [f"on {n} ranks: {split.refused}" for n, split in each.splits.items() if split.refused]


def _fallbacks(each: Found) -> list[str]:
    """Each reason once, with the first module where it occurs."""
    first: dict[str, str] = {}
    for split in each.splits.values():
        for path, reason in split.fallbacks:
            first.setdefault(reason, path)
    return [f"{reason} (in {path})" for reason, path in first.items()]


def _read(each: Found) -> list[str]:
    """Each input once, with the lines that read its value."""
    lines: dict[str, set[str]] = {}
    for paths, line in each.read:
        for path in paths.split(", "):
            lines.setdefault(path.split(".")[0], set()).add(line)
    return [f"`{name}` at {_slashes(iter(sorted(where)))}" for name, where in lines.items()]


def _notes(title: str, found: Sequence[Found], of: Callable[[Found], Iterator[str] | list[str]]) -> list[str]:
    """A list of classes; cases of one class that have the same notes share a line."""
    names: dict[tuple[str, str], list[str]] = {}
    for each in found:
        if notes := "; ".join(of(each)):
            names.setdefault((each.kind or "?", notes), []).append(f"`{each.name}`")
    lines = [f"- {kind} ({', '.join(cases)}): {notes}" for (kind, notes), cases in names.items()]
    return [f"\n**{title}**\n", *lines] if lines else []


def _table(cases: Sequence[Found]) -> list[str]:
    heading = ("class", "case", "operators", "difference", "bound", "kB", "displaced", "bf16", "fallbacks")
    return [
        f"| {' | '.join(heading)} |",
        "| --- | --- |" + " ---: |" * (len(heading) - 2),
        *(f"| {each.kind} | {each.name} | {' | '.join(_cells(each))} |" for each in cases),
    ]


def _cells(each: Found) -> Iterator[str]:
    if not each.splits:
        yield from ("refused" if each.refused else "failed", *[""] * 6)
        return
    splits = each.splits.values()
    yield f"{each.operators}" + (f" ({len(each.read)})" if each.read else "")
    yield _slashes("refused" if s.refused else _small(s.error) for s in splits)
    yield _slashes("–" if s.refused else f"{s.bound:.2f}" for s in splits)
    yield _slashes("–" if s.refused else f"{s.received / 1e3:.0f}" for s in splits)
    yield "–" if each.displaced is None else _small(each.displaced)
    yield "does not run" if each.bf16_refused else "–" if each.bf16 is None else f"{each.bf16:.2f}"
    yield str(len(_fallbacks(each)) or "")


def _small(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


def _slashes(words: Iterator[str]) -> str:
    return " / ".join(words)
