"""The cells of a study: make each of them, and compare it with the unsplit run."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.strategy import Strategy
from ...passes.cuts import WorldSizeError
from .results import Cell, Outcome, Results

if TYPE_CHECKING:
    from rich.progress import Progress

    from .runs import Generation, Subject

SHOWN = 6  #: images per cell in the contact sheets


@dataclass(frozen=True)
class Grid:
    """The settings of a study; cells are their product."""

    pipelines: Sequence[str]
    strategies: Sequence[Strategy]
    ranks: Sequence[int]
    steps: Sequence[int]
    warmups: Sequence[int | None]  #: None: the strategy's own
    prompts: int
    prompt_file: Path | None
    size: int
    batch: int

    def cells(self, subject: Subject) -> dict[Cell, Strategy]:
        """One per distinct setting; an exact strategy has no warm-up."""
        found: dict[Cell, Strategy] = {}
        for steps in self.steps:
            for ranks in self.ranks:
                for strategy in self.strategies:
                    for warmup in self.warmups:
                        own = strategy.warmup_steps if warmup is None else warmup
                        exact = None if strategy.exact else max(1, own)  # there is always one
                        cell = Cell(
                            subject.name, self.size, self.prompts, subject.digest, steps, ranks, strategy.name, exact,
                            strategy.cooldown_steps,
                        )  # fmt: skip
                        found.setdefault(cell, strategy)
        return found

    def command(self, baseline: str, output: Path) -> str:
        """The command that makes this grid, with all options written out."""
        words = ["fxpass", "study"]
        for name in self.pipelines:
            words += ["--pipeline", name]
        words += ["--strategies", ",".join(strategy.name for strategy in self.strategies)]
        words += ["--ranks", ",".join(map(str, self.ranks)), "--steps", ",".join(map(str, self.steps))]
        if given := [str(warmup) for warmup in self.warmups if warmup is not None]:
            words += ["--warmup", ",".join(given)]
        if self.prompt_file is not None:
            words += ["--prompt-file", str(self.prompt_file)]
        words += ["--prompts", str(self.prompts), "--size", str(self.size), "--batch", str(self.batch)]
        return shlex.join([*words, "--baseline", baseline, "--output", str(output)])


def run(grid: Grid, results: Results, folder: Path, out: Any) -> None:
    """Make all cells that are not finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ...ir.progress import watched
    from .runs import subject

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for name in grid.pipelines:
        asked = subject(name, grid.prompts, grid.size, grid.prompt_file)
        cells = grid.cells(asked)
        todo = {cell: strategy for cell, strategy in cells.items() if cell not in results.finished}
        out.print(f"{name}: {len(cells)} cells, {len(cells) - len(todo)} of them finished", style="bold")
        with watched(None), Progress(*columns, console=out) as progress:
            bar = progress.add_task(f"cells of {name}", total=len(todo))
            whole: tuple[int, Generation] | None = None
            for cell, strategy in todo.items():
                if whole is None or whole[0] != cell.steps:
                    whole = cell.steps, unsplit(asked, cell, grid.batch, folder, progress)
                outcome = make_cell(asked, cell, strategy, grid.batch, whole[1], results, folder, progress)
                progress.advance(bar)
                progress.console.print(f"{outcome.seconds:7.1f} s  {cell}  {outcome.impossible}", soft_wrap=True)


def unsplit(asked: Subject, cell: Cell, batch: int, folder: Path, progress: Progress) -> Generation:
    """The unsplit run that a cell is compared with; read from the folder if it is there, else made."""
    import torch

    from ..pictures import image
    from .runs import Generation

    path = folder / "unsplit" / f"{cell.group}-{cell.steps}steps.pt"
    if path.exists():
        kept = torch.load(path)
        return Generation(kept["pictures"].numpy(), kept["latents"], kept["features"], kept["calls"])
    made = _generate(asked, cell.steps, batch, progress, f"unsplit, {cell.steps} steps")
    path.parent.mkdir(exist_ok=True)
    image(strip(made.pictures)).save(path.with_suffix(".png"))
    kept = {"pictures": torch.from_numpy(made.pictures), "latents": made.latents, "features": made.features}
    torch.save(kept | {"calls": made.calls}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return made


def make_cell(
    asked: Subject,
    cell: Cell,
    strategy: Strategy,
    batch: int,
    whole: Generation,
    results: Results,
    folder: Path,
    progress: Progress,
) -> Outcome:
    """Run one cell and add it to the results. If the model has too few rows, the outcome says so."""
    from ...plan import Plan
    from ..pictures import image
    from .runs import busiest, compare, split, step_errors

    began = time.perf_counter()
    try:
        with split(asked.pipe, cell.ranks, strategy, cell.warmup) as model:
            found = _generate(asked, cell.steps, batch, progress, str(cell))
            last = len(asked.prompts) % batch or min(batch, len(asked.prompts))  # batch of the plan
            assert isinstance(model.plan, Plan)
            received = busiest(model.plan, cell.steps)
    except WorldSizeError as error:
        outcome = Outcome(cell, None, None, time.perf_counter() - began, " ".join(str(error).split()))
        results.add(outcome, [], [])
        return outcome
    seconds = time.perf_counter() - began
    total, exposed = (bytes_ * found.calls / last for bytes_ in (received.total, received.exposed))
    path = folder / "pictures" / f"{cell.slug}.png"
    path.parent.mkdir(exist_ok=True)
    image(strip(found.pictures)).save(path)
    outcome = Outcome(cell, total, exposed, seconds)
    results.add(outcome, compare(cell, asked.prompts, found, whole), step_errors(cell, found, whole))
    return outcome


def _generate(asked: Subject, steps: int, batch: int, progress: Progress, label: str) -> Generation:
    from .runs import generate

    calls = -(-len(asked.prompts) // batch)
    bar = progress.add_task(label, total=steps * calls)
    stepped: Callable[[], None] = lambda: progress.advance(bar)  # noqa: E731
    try:
        return generate(asked, steps, batch, stepped)
    finally:
        progress.remove_task(bar)


def strip(pictures: Any) -> Any:
    """The first images of a run side by side: [H, W * SHOWN, 3]."""
    import numpy as np

    return np.concatenate(list(pictures[:SHOWN]), axis=1)
