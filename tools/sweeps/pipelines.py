"""Sweep the pipelines: whether each class, and each use of one, gives the unsplit result; writes docs/pipelines.md.

    python -m fxpass.tools.sweeps.pipelines [--only NAME ...] [--fresh] [--report-only]
                                            [--jobs 1] [--seconds 300] [--gigabytes 8]

Each class is measured in a process of its own (`pipelines_case`), within limits of time and memory, and so is each use
(`pipeline_uses`). Results are kept in `out/pipelines/`, one file each, so that an interrupted sweep goes on. A class is
measured again when how it is built, the compiler, torch or diffusers has changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...models.pipelines_zoo import files_of, names
from ...models.pipelines_zoo.uses import USES
from ..checkout import ROOT, head
from . import pipeline_uses
from .apart import digest, keep, kept, measured, options_of, sources
from .pipelines_case import Found, measure
from .pipelines_report import report

SOURCES = ("fxpass", "passes", "runtime", "models/zoo", "tools/sweeps/pipelines_case.py")


def main() -> None:
    options = options_of(__doc__, "classes", "pipelines", jobs=1, seconds=300)
    everything = names()
    wanted = options.only or everything
    if unknown := set(wanted) - set(everything):
        raise SystemExit(f"diffusers exports no pipeline called {', '.join(sorted(unknown))}")
    if not options.report_only:
        todo = [name for name in wanted if options.fresh or not _is_current(options.folder, name)]
        print(f"{len(everything)} classes, {len(todo)} to measure", flush=True)
        limits: dict[str, Any] = {"jobs": options.jobs, "seconds": options.seconds, "gigabytes": options.gigabytes}
        keys = {name: key_of(name) for name in todo}
        commit = head()
        for done, (name, data) in enumerate(measured(measure, keys, options.folder, **limits), 1):
            keep(options.folder, name, data := data | {"commit": commit})
            found = Found.of(data)
            print(f"{done:4d}/{len(todo)}  {found.seconds:6.1f} s  {name}: {found.verdict}{_more(found)}", flush=True)
        _sweep_uses(options, limits)
    found = [Found.of(data) for name in everything if (data := kept(options.folder, name)) is not None]
    old = [name for name in everything if not _is_current(options.folder, name)]
    (ROOT / "docs" / "pipelines.md").write_text(report(found, old, _uses(options.folder)))
    print("written  docs/pipelines.md")


def _more(found: Found) -> str:
    reason = found.left_out or found.none or found.refused or found.failed
    return f": {reason}" if reason else f", {found.error:.0e}, split: {', '.join(found.split)}"


def _sweep_uses(options: argparse.Namespace, limits: dict[str, Any]) -> None:
    key = digest([*_construction(), *sources("models/pipelines_zoo/uses.py", "tools/sweeps/pipeline_uses.py")])
    todo = [name for name in USES if options.fresh or (kept(options.folder / "uses", name) or {}).get("key") != key]
    keys = dict.fromkeys([] if options.only else todo, key)
    for name, data in measured(pipeline_uses.measure, keys, options.folder / "uses", **limits):
        said = data["failed"] or ", ".join(f"{order}: {data[order]}" for order in pipeline_uses.orders_of(name))
        print(f"{USES[name].title}: {said}", flush=True)


def _uses(folder: Path) -> dict[str, tuple[str, ...]]:
    """The outcomes of each use that was measured, by its title; an empty one where it is not measured."""
    found = {name: kept(folder / "uses", name) for name in USES}
    columns = (*pipeline_uses.ORDERS, *pipeline_uses.WIDELY)
    return {
        USES[name].title: tuple(
            data.get(order, data["failed"]) if order in pipeline_uses.orders_of(name) else "" for order in columns
        )
        for name, data in found.items()
        if data is not None
    }


def _construction() -> list[Path]:
    files = sorted((ROOT / "models" / "pipelines_zoo").glob("*.py"))
    return [*sources(*SOURCES), *(file for file in files if file.name != "uses.py")]


def key_of(name: str) -> str:
    """A hash of what the result depends on: the compiler, how the class is built, torch and diffusers."""
    return digest([*_construction(), *files_of(name)])


def _is_current(folder: Path, name: str) -> bool:
    data = kept(folder, name)
    return data is not None and data["key"] == key_of(name)


if __name__ == "__main__":
    main()
