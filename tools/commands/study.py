"""`fxpass study`: measure the quality of images that are made with stale exchanges, and the bytes that this saves.

A trained pipeline makes held-out prompts unsplit and, from the same noise, for every cell of a grid: strategies x ranks
x steps x warm-up. Ranks run one after the other in this process: images equal those of as many processes, bytes are
those of the plan, and seconds mean nothing.

Finished cells are kept (`study/results.py`); an interrupted study continues where it stopped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

STRATEGIES = ("displaced", "corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync", "pcpp", "asyncdiff")


def study(
    pipeline: Annotated[
        list[str], typer.Option("--pipeline", help="demo, demo_dit or a diffusers folder; may be given several times.")
    ] = ["demo"],  # noqa: B006
    strategies: Annotated[str, typer.Option(help="Names, with commas between.")] = ",".join(STRATEGIES),
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "2,4,8",
    steps: Annotated[str, typer.Option(help="Numbers of denoising steps.")] = "10,20,50",
    warmup: Annotated[
        str | None, typer.Option(help="Numbers of exact steps at the beginning; by default each strategy's own.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many, each with noise of its own.")] = 32,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One prompt (or class) per line, for a pipeline that is no demo.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Height and width in pixels.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 8,
    baseline: Annotated[str, typer.Option(help="The strategy that the others are compared with.")] = "stale_gn",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder; cells that it holds are not made again.")
    ] = Path("out/study"),
    report_only: Annotated[bool, typer.Option("--report-only", help="Only write table and figures again.")] = False,
) -> None:
    """Measure the quality of stale strategies, and the bytes that they save."""
    check_installed()
    from ...ir.strategy import Strategy
    from ..console import console
    from ..study.grid import Grid, run
    from ..study.report import write_report
    from ..study.results import Results

    grid = Grid(
        list(dict.fromkeys(pipeline)),
        [Strategy.of(name) for name in _words("--strategies", strategies)],
        numbers("--ranks", ranks),
        numbers("--steps", steps),
        [None] if warmup is None else numbers("--warmup", warmup),
        prompts,
        prompt_file,
        size,
        batch,
    )
    against = Strategy.of(baseline).name
    if report_only and not (output / "cells.csv").is_file():
        raise ValueError(f"there is no study in {output}; leave out --report-only to make one")
    out = console()
    results = Results(output)
    if not report_only:
        results.clean()
        note_command(output, grid.command(against, output))
        run(grid, results, output, out)
    for path in write_report(output, results, against):
        out.print(f"written  {path}", soft_wrap=True)


def check_installed() -> None:
    """Raises `MissingExtraError` if a library of the study is missing, before hours of work."""
    from ...extras import EXTRA_OF, MissingExtraError

    for module, extra in EXTRA_OF.items():
        if extra == "study" and importlib.util.find_spec(module) is None:
            raise MissingExtraError(module)


def numbers(option: str, text: str) -> list[int]:
    """`2,4,8` as a list. Raises `ValueError` for anything else."""
    words = _words(option, text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{option} takes whole numbers above 0 with commas between, e.g. 2,4,8; not {text!r}")
    return [int(word) for word in words]


def _words(option: str, text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ValueError(f"{option} is empty; give at least one")
    return words


def note_command(folder: Path, command: str) -> None:
    """Add a command to those that made a folder's results, unless it is there."""
    path = folder / "commands.txt"
    known = path.read_text().splitlines() if path.exists() else []
    if command not in known:
        path.write_text("\n".join([*known, command]) + "\n")
