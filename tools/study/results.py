"""Results of `fxpass study`: three CSV files in one folder, to which finished cells are appended.

    cells.csv     one row per cell: what it costs, or why it is impossible
    pictures.csv  one row per image
    steps.csv     one row per image and step

A cell is finished when `cells.csv` lists it; that file is written last. Rows of unfinished cells, half rows included,
are dropped before the next run.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints


@dataclass(frozen=True)
class Cell:
    """One setting of the study."""

    pipeline: str
    size: int  #: height and width of the images, in pixels
    prompts: int
    digest: str  #: hash of prompts, guidance and weights
    steps: int
    ranks: int
    strategy: str
    warmup: int | None  #: exact steps at the beginning; None if all are
    cooldown: int = 0  #: exact steps at the end

    @property
    def exact(self) -> int:
        """Number of exact steps."""
        return self.steps if self.warmup is None else self.warmup + self.cooldown

    @property
    def group(self) -> str:
        """What cells must share to be comparable, as part of a file name."""
        return re.sub(r"[^\w.-]+", "_", f"{self.pipeline}-{self.size}px-{self.prompts}prompts-{self.digest}")

    @property
    def slug(self) -> str:
        """The cell as part of a file name."""
        exact = "" if self.warmup is None else f"-exact{self.warmup}+{self.cooldown}"
        return f"{self.group}-{self.steps}steps-{self.ranks}ranks-{self.strategy}{exact}"

    @property
    def label(self) -> str:
        """The strategy's name in figures."""
        return self.strategy if self.warmup is None else f"{self.strategy}, {self.warmup} + {self.cooldown} exact"

    def __str__(self) -> str:
        return f"{self.pipeline}, {self.steps} steps, {self.ranks} ranks, {self.label}"


@dataclass(frozen=True)
class Outcome:
    """What one cell costs.

    Bytes are those that the busiest rank receives for one image, over all steps and guidance branches, at 2 bytes per
    floating-point number (half precision)."""

    cell: Cell
    total_bytes_fp16: float | None
    exposed_bytes_fp16: float | None  #: of these, awaited in the step that sent them
    seconds: float
    impossible: str = ""  #: why the cell cannot be made; the other fields are empty then


@dataclass(frozen=True)
class Picture:
    """One image of a split run, compared with that of the unsplit run."""

    cell: Cell
    prompt: int
    text: str
    psnr: float  #: dB, at most `runs.CAP`
    ssim: float
    features: float  #: relative L2 distance of the denoiser's features
    latent: float  #: relative L2 distance of the final latents
    right: bool | None  #: whether the reader finds what the prompt says; None without a reader
    right_unsplit: bool | None


@dataclass(frozen=True)
class StepError:
    """The relative L2 distance of the latents after one step."""

    cell: Cell
    prompt: int
    step: int  #: counted from 1
    error: float


Row = TypeVar("Row", Outcome, Picture, StepError)


class Table(Generic[Row]):
    """A CSV file: the fields of the cell, then those of the row."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path = path
        self.kind = kind
        self._own = [field.name for field in fields(kind)][1:]
        self._header = [*(field.name for field in fields(Cell)), *self._own]

    def read(self) -> list[Row]:
        """Read all complete rows. Raises `ValueError` if the file has other columns."""
        if not self.path.exists():
            return []
        whole = self.path.read_text()
        header, *lines = csv.reader(io.StringIO(whole[: whole.rfind("\n") + 1])) or [[]]
        if header != self._header:
            raise ValueError(f"{self.path} has other columns than this version writes; give another --output")
        cells: dict[tuple[str, ...], Cell] = {}
        rows: list[Row] = []
        width = len(fields(Cell))
        for line in lines:
            key = tuple(line[:width])
            if key not in cells:
                cells[key] = Cell(**_parsed(Cell, dict(zip(self._header, key, strict=False))))
            own = _parsed(self.kind, dict(zip(self._own, line[width:], strict=True)))
            rows.append(self.kind(cell=cells[key], **own))
        return rows

    def write(self, rows: Iterable[Row]) -> None:
        """Replace the file atomically."""
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(_csv([self._header]) + self._lines(rows))
        os.replace(fresh, self.path)

    def append(self, rows: Iterable[Row]) -> None:
        with self.path.open("a") as file:
            file.write(self._lines(rows))

    def _lines(self, rows: Iterable[Row]) -> str:
        return _csv(
            (*map(_text, astuple(row.cell)), *(_text(getattr(row, name)) for name in self._own)) for row in rows
        )


class Results:
    """The finished cells of a folder."""

    def __init__(self, folder: Path) -> None:
        self._errors = Table(folder / "steps.csv", StepError)
        self._pictures = Table(folder / "pictures.csv", Picture)
        self._outcomes = Table(folder / "cells.csv", Outcome)
        self.outcomes = self._outcomes.read()
        self.finished = {outcome.cell for outcome in self.outcomes}
        self.pictures = [row for row in self._pictures.read() if row.cell in self.finished]
        self.errors = [row for row in self._errors.read() if row.cell in self.finished]

    def clean(self) -> None:
        """Create the files, or drop rows of unfinished cells from them."""
        self._errors.path.parent.mkdir(parents=True, exist_ok=True)
        self._errors.write(self.errors)
        self._pictures.write(self.pictures)
        self._outcomes.write(self.outcomes)

    def add(self, outcome: Outcome, pictures: list[Picture], errors: list[StepError]) -> None:
        """Append a cell; its row in `cells.csv`, which marks it as finished, comes last."""
        self._errors.append(errors)
        self._pictures.append(pictures)
        self._outcomes.append([outcome])
        self.errors += errors
        self.pictures += pictures
        self.outcomes.append(outcome)
        self.finished.add(outcome.cell)


def _csv(lines: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.7g}"
    return " ".join(str(value).split())  # one line per row


def _parsed(kind: type[Any], texts: dict[str, str]) -> dict[str, Any]:
    """Parse the values of dataclass fields by their types."""
    hints = get_type_hints(kind)
    return {name: _value(hints[name], text) for name, text in texts.items()}


def _value(hint: Any, text: str) -> Any:
    if hint is str:
        return text
    if text == "":
        return None
    if hint == (bool | None):
        return text == "True"
    return int(text) if hint in (int, int | None) else float(text)
