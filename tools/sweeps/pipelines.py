"""Sweep the pipelines: whether each class gives the unsplit result when split; writes docs/pipelines.md.

    python -m fxpass.tools.sweeps.pipelines [--only NAME ...] [--fresh] [--report-only]
                                            [--jobs 1] [--seconds 300] [--gigabytes 8]

Each class is measured in a process of its own (`pipelines_case`), within limits of time and memory. Results are kept
in `out/pipelines/`, one file per class, so that an interrupted sweep goes on. A class is measured again when how it is
built, the compiler, torch or diffusers has changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...models.pipelines_zoo import files_of, names
from ..checkout import ROOT
from .apart import digest, kept, measured, sources
from .pipelines_case import Found, measure
from .pipelines_report import report

SOURCES = ("fxpass", "passes", "runtime", "models/zoo", "tools/sweeps/pipelines_case.py")


def main() -> None:
    options = _options()
    everything = names()
    wanted = options.only or everything
    if unknown := set(wanted) - set(everything):
        raise SystemExit(f"diffusers exports no pipeline called {', '.join(sorted(unknown))}")
    if not options.report_only:
        todo = [name for name in wanted if options.fresh or not _is_current(options.folder, name)]
        print(f"{len(everything)} classes, {len(todo)} to measure", flush=True)
        limits = {"jobs": options.jobs, "seconds": options.seconds, "gigabytes": options.gigabytes}
        keys = {name: key_of(name) for name in todo}
        for done, (name, data) in enumerate(measured(measure, keys, options.folder, **limits), 1):
            found = Found.of(data)
            print(f"{done:4d}/{len(todo)}  {found.seconds:6.1f} s  {name}: {found.verdict}{_more(found)}", flush=True)
    found = [Found.of(data) for name in everything if (data := kept(options.folder, name)) is not None]
    old = [name for name in everything if not _is_current(options.folder, name)]
    (ROOT / "docs" / "pipelines.md").write_text(report(found, old))
    print("written  docs/pipelines.md")


def _more(found: Found) -> str:
    reason = found.left_out or found.none or found.refused or found.failed
    return f": {reason}" if reason else f", {found.error:.0e}, split: {', '.join(found.split)}"


def key_of(name: str) -> str:
    """A hash of what the result depends on: the compiler, how the class is built, torch and diffusers."""
    construction = sorted((ROOT / "models" / "pipelines_zoo").glob("*.py"))
    return digest([*sources(*SOURCES), *construction, *files_of(name)])


def _is_current(folder: Path, name: str) -> bool:
    data = kept(folder, name)
    return data is not None and data["key"] == key_of(name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these classes only")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a current result")
    parser.add_argument("--report-only", action="store_true", help="only write the table")
    parser.add_argument("--jobs", type=int, default=1, help="how many classes at a time")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a class")
    parser.add_argument("--gigabytes", type=float, default=8, help="memory limit of a class")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "pipelines", help="where results are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
