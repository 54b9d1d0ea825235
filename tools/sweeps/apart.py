"""Run measurements in processes of their own, within limits of time and memory, and keep their results as files."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkout import ROOT

Measure = Callable[[str, str], dict[str, Any]]  #: from a name and a key: plain data, with an entry `failed`


def measured(
    measure: Measure, keys: dict[str, str], folder: Path, *, jobs: int, seconds: float, gigabytes: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure each name, `jobs` at a time, as it is done. The processes share what `measure`'s module imports.

    Args:
        keys: what the result of each name depends on, as a hash.
        folder: where results are kept, one file per name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__module__])
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(_in_process, context, measure, name, key, folder, seconds, gigabytes): name
            for name, key in keys.items()
        }
        for one in as_completed(waiting):
            yield waiting[one], one.result()


def options_of(description: str | None, what: str, folder: str, *, jobs: int, seconds: float) -> argparse.Namespace:
    """The command line of a sweep.

    Args:
        what: it measures: "cases".
        folder: where its results are kept, in `out/`.
        jobs, seconds: defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"these {what} only")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a current result")
    parser.add_argument("--report-only", action="store_true", help="only write the table")
    parser.add_argument("--jobs", type=int, default=jobs, help=f"how many {what} at a time")
    parser.add_argument("--seconds", type=float, default=seconds, help="time limit of each")
    parser.add_argument("--gigabytes", type=float, default=8, help="memory limit of each")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / folder, help="where results are kept")
    return parser.parse_args()


def kept(folder: Path, name: str) -> dict[str, Any] | None:
    """The kept result of a name."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def keep(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Keep the result of a name."""
    path = folder / f"{name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(found, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def digest(paths: Iterable[Path], packages: tuple[str, ...] = ("torch", "diffusers")) -> str:
    """A hash of files and of the versions of packages."""
    return _digest(tuple(paths), packages)


@cache
def _digest(paths: tuple[Path, ...], packages: tuple[str, ...]) -> str:
    made = hashlib.sha256(" ".join(map(version, packages)).encode())
    for path in paths:
        made.update(path.read_bytes())
    return made.hexdigest()[:16]


def sources(*names: str) -> list[Path]:
    """The Python files of folders of the repository, or single ones."""
    paths = [ROOT / name for name in names]
    return [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("**/*.py")))]


def _in_process(
    context: Any, measure: Measure, name: str, key: str, folder: Path, seconds: float, gigabytes: float
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    process = context.Process(target=_measure, args=(measure, name, key, folder, gigabytes))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        failed = f"it took more than {seconds:.0f} seconds"
    else:
        failed = f"its process ended with {process.exitcode}"
    if (found := kept(folder, name)) is None:
        found = {"name": name, "key": key, "failed": failed}
        keep(folder, name, found)
    return found


def _measure(measure: Measure, name: str, key: str, folder: Path, gigabytes: float) -> None:
    """Measure one name; runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = measure(name, key)
    if "MemoryError" in found["failed"] or "can't allocate memory" in found["failed"]:
        found["failed"] = f"it took more than {gigabytes:g} GB"
    keep(folder, name, found)
