"""Sweep the zoo: measure whether each model is exact when split, and at what cost; writes docs/coverage.md.

    python -m fxpass.tools.sweeps.zoo [--only NAME ...] [--fresh] [--report-only]
                                      [--jobs 2] [--seconds 180] [--gigabytes 8]

Each case is measured in a process of its own (`zoo_case`), within limits of time and memory. Results are kept in
`out/zoo/`, one file per case, and measured again when the case, the compiler, torch or diffusers has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...models.case import Case
from ...models.zoo import CASES, sources_of
from ..checkout import ROOT
from .zoo_case import Found, measure

SOURCES = ("fxpass", "passes", "runtime", "models/inputs")  #: folders whose sources the results depend on
SHARED = ("models/case.py", "models/wrappers.py", "tools/sweeps/zoo_case.py")


def main() -> None:
    options = _options()
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
    """Measure each case in a process of its own, `jobs` at a time; the processes share what they import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.zoo_case"])
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_in_process, context, case, folder, seconds, gigabytes) for case in cases]
        for done, one in enumerate(as_completed(waiting), 1):
            found = one.result()
            print(f"{done:4d}/{len(cases)}  {found.seconds:6.1f} s  {found.name}: {verdict(found)}", flush=True)


def verdict(found: Found) -> str:
    """A result in a few words."""
    if found.failed or found.refused:
        return f"failed: {found.failed}" if found.failed else f"refused: {found.refused}"
    ranks = [f"{n}: " + (split.refused or f"{split.error:.0e}") for n, split in found.splits.items()]
    fallbacks = len({each for split in found.splits.values() for each in split.fallbacks})
    return ", ".join(ranks) + (f"; {fallbacks} fallbacks" if fallbacks else "")


def read(folder: Path, name: str) -> Found | None:
    """The kept result of a case."""
    path = folder / f"{name}.json"
    return Found.of(json.loads(path.read_text())) if path.exists() else None


def key_of(case: Case) -> str:
    """A hash of what the result depends on: the compiler, the files of the case, torch and diffusers."""
    return _digest(tuple(sorted(sources_of(case))))


@cache
def _digest(cases: tuple[Path, ...]) -> str:
    sources = [path for name in SOURCES for path in sorted((ROOT / name).glob("**/*.py"))]
    digest = hashlib.sha256(f"{version('torch')} {version('diffusers')}".encode())
    for path in (*sources, *(ROOT / name for name in SHARED), *cases):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_current(folder: Path, case: Case) -> bool:
    found = read(folder, case.name)
    return found is not None and found.key == key_of(case)


def _in_process(context: Any, case: Case, folder: Path, seconds: float, gigabytes: float) -> Found:
    key, began = key_of(case), time.perf_counter()
    (folder / f"{case.name}.json").unlink(missing_ok=True)
    process = context.Process(target=_measure, args=(case.name, key, folder, gigabytes))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        failed = f"it took more than {seconds:.0f} seconds"
    else:
        failed = f"its process ended with {process.exitcode}"
    if (found := read(folder, case.name)) is None:
        found = Found(case.name, key, case.covers or case.name, failed=failed, seconds=time.perf_counter() - began)
        _keep(folder, found)
    return found


def _measure(name: str, key: str, folder: Path, gigabytes: float) -> None:
    """Measure one case; runs in the case's own process."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = measure(name, key)
    if "MemoryError" in found.failed or "can't allocate memory" in found.failed:
        found = replace(found, failed=f"it took more than {gigabytes:g} GB")
    _keep(folder, found)


def _keep(folder: Path, found: Found) -> None:
    path = folder / f"{found.name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(found.plain(), indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases only")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a current result")
    parser.add_argument("--report-only", action="store_true", help="only write the table")
    parser.add_argument("--jobs", type=int, default=2, help="how many cases at a time")
    parser.add_argument("--seconds", type=float, default=180, help="time limit of a case")
    parser.add_argument("--gigabytes", type=float, default=8, help="memory limit of a case")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "zoo", help="where results are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
