"""Sweep the zoo: measure whether each model is exact when split, and at what cost; writes docs/coverage.md.

    python -m fxpass.tools.sweeps.zoo [--only NAME ...] [--fresh] [--report-only]
                                      [--jobs 2] [--seconds 180] [--gigabytes 8]

Each case is measured in a process of its own (`zoo_case`), within limits of time and memory. Results are kept in
`out/zoo/`, one file per case, and measured again when the case, the compiler, torch or diffusers has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...models.case import Case
from ...models.zoo import CASES, sources_of
from ..checkout import ROOT
from .apart import digest, kept, measured, options_of, sources
from .zoo_case import Found, plain

SOURCES = ("fxpass", "passes", "runtime", "models/inputs")  #: folders whose sources the results depend on
SHARED = ("models/case.py", "models/wrappers.py", "tools/sweeps/zoo_case.py")


def main() -> None:
    options = options_of(__doc__, "cases", "zoo", jobs=2, seconds=180)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    if unknown := set(options.only) - {case.name for case in cases}:
        raise SystemExit(f"no case of the zoo is called {', '.join(sorted(unknown))}")
    if not options.report_only:
        todo = [case for case in cases if options.fresh or not _is_current(folder, case)]
        print(f"{len(CASES)} cases, {len(todo)} to measure", flush=True)
        sweep(todo, folder, options.jobs, options.seconds, options.gigabytes)
    found = [each for case in CASES if (each := read(folder, case.name)) is not None]
    from .zoo_report import report

    old = [case.name for case in CASES if not _is_current(folder, case)]
    (ROOT / "docs" / "coverage.md").write_text(report(found, old))
    print("written  docs/coverage.md")


def sweep(cases: list[Case], folder: Path, jobs: int, seconds: float, gigabytes: float) -> None:
    """Measure each case in a process of its own, `jobs` at a time."""
    keys = {case.name: key_of(case) for case in cases}
    limits: dict[str, Any] = {"jobs": jobs, "seconds": seconds, "gigabytes": gigabytes}
    for done, (name, data) in enumerate(measured(plain, keys, folder, **limits), 1):
        found = Found.of(data)
        print(f"{done:4d}/{len(cases)}  {found.seconds:6.1f} s  {name}: {verdict(found)}", flush=True)


def verdict(found: Found) -> str:
    """A result in a few words."""
    if found.failed or found.refused:
        return f"failed: {found.failed}" if found.failed else f"refused: {found.refused}"
    ranks = [f"{n}: " + (split.refused or f"{split.error:.0e}") for n, split in found.splits.items()]
    fallbacks = len({each for split in found.splits.values() for each in split.fallbacks})
    return ", ".join(ranks) + (f"; {fallbacks} fallbacks" if fallbacks else "")


def read(folder: Path, name: str) -> Found | None:
    """The kept result of a case."""
    data = kept(folder, name)
    return None if data is None else Found.of(data)


def key_of(case: Case) -> str:
    """A hash of what the result depends on: the compiler, the files of the case, torch and diffusers."""
    return digest([*sources(*SOURCES, *SHARED), *sorted(sources_of(case))])


def _is_current(folder: Path, case: Case) -> bool:
    found = read(folder, case.name)
    return found is not None and found.key == key_of(case)


if __name__ == "__main__":
    main()
