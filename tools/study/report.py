"""Tables and figures of a study: `study.md`, plots and contact sheets, from the files of `results`.

study.md           per cell: quality with 95 % intervals, bytes, and the commands that made it
quality-….png      PSNR against bytes
steps-….png        error of the latents after each step
pictures-….png     a few images, unsplit and of every strategy
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

from .results import Cell, Outcome, Picture, Results
from .runs import CAP

CONFIDENCE = 0.95
PANEL = 192  #: narrower images of a contact sheet are enlarged to at least this many pixels
WORSE = "#b00020"
COLUMNS = 3  #: panels side by side

HEADINGS = (
    "steps", "ranks", "strategy", "exact steps", "PSNR, dB", "against {baseline}, dB", "SSIM", "feature distance",
    "latent error", "right, split", "right, unsplit", "MB", "exposed MB",
)  # fmt: skip

NOTES = """\
Every image is compared with that of the unsplit model from the same prompt and the same noise. ± is half the width of
the 95 % interval of the mean over the images (Student's t). *Against* is the mean difference of PSNR on the same images
to the baseline strategy at the same steps, ranks and number of exact steps. **Exact steps**: at the beginning + at the
end of a generation.

- **PSNR, SSIM**: of the images. PSNR is capped at {cap:.0f} dB, which means "equal to rounding".
- **Feature distance**: relative L2 distance of the outputs of the denoiser's middle block for the final latents.
- **Latent error**: relative L2 distance of the final latents.
- **Right**: images in which a script finds the shape, colour and position of the prompt, and nothing else (demos only).
- **MB**: million bytes that the busiest rank receives for one image in the whole generation, guidance included,
  counted at 2 bytes per floating-point number (half precision). **Exposed**: those awaited in the step that sent them.
"""


def write_report(folder: Path, results: Results, baseline: str) -> list[Path]:
    """Write the table, plots and contact sheets; returns the files. Without a finished cell, only the table."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in sorted(results.outcomes, key=lambda each: _order(each.cell)):
        groups[outcome.cell.group].append(outcome)
    pictures: dict[Cell, list[Picture]] = defaultdict(list)
    for row in results.pictures:
        pictures[row.cell].append(row)
    errors: dict[Cell, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results.errors:
        errors[row.cell][row.step].append(row.error)
    written = [folder / "study.md"]
    sections = [table(outcomes, pictures, baseline) for outcomes in groups.values()]
    written[0].write_text("\n".join([_head(folder), *sections]))
    for group, outcomes in groups.items():
        made = [outcome for outcome in outcomes if not outcome.impossible]
        if made:
            written += [
                quality_plot(made, pictures, folder / f"quality-{group}.png"),
                steps_plot([outcome.cell for outcome in made], errors, folder / f"steps-{group}.png"),
                *sheets([outcome.cell for outcome in made], pictures, folder),
            ]
    return written


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval, which is NaN for a single value."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, nan
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


# ------------------------------------------------------------------------------------------------ the table


def _head(folder: Path) -> str:
    commands = folder / "commands.txt"
    block = commands.read_text() if commands.exists() else ""
    return f"# Study\n\n```\n{block}```\n\n{NOTES.format(cap=CAP)}"


def table(outcomes: Sequence[Outcome], pictures: dict[Cell, list[Picture]], baseline: str) -> str:
    """The section of one pipeline as Markdown."""
    first = outcomes[0].cell
    lines = [
        f"## {first.pipeline}, {first.size} x {first.size}, {first.prompts} prompts\n",
        _row(heading.format(baseline=baseline) for heading in HEADINGS),
        _row(["---"] * 4 + ["---:"] * (len(HEADINGS) - 4)),
    ]
    lines += [_row(_cells(outcome, pictures, baseline)) for outcome in outcomes]
    reasons = dict.fromkeys(f"- {each.cell.ranks} ranks: {each.impossible}" for each in outcomes if each.impossible)
    if reasons:
        lines += ["\nImpossible cells:\n", *reasons]
    return "\n".join(lines) + "\n"


def _cells(outcome: Outcome, pictures: dict[Cell, list[Picture]], baseline: str) -> list[str]:
    cell, rows = outcome.cell, pictures.get(outcome.cell)
    exact = "all" if cell.warmup is None else f"{cell.warmup} + {cell.cooldown}"
    setting = [str(cell.steps), str(cell.ranks), cell.strategy, exact]
    if not rows or outcome.total_bytes_fp16 is None or outcome.exposed_bytes_fp16 is None:
        return setting + ["impossible"] + ["–"] * (len(HEADINGS) - 5)
    psnr = interval([row.psnr for row in rows])
    figures = [f"≥ {CAP:.0f}" if psnr[0] == CAP else _spread(psnr, 2)]
    against = [] if cell.warmup is None or cell.strategy == baseline else _of_baseline(cell, pictures, baseline)
    figures.append(_spread(difference(rows, against), 2, sign="+") if against else "–")
    figures.append(_spread(interval([row.ssim for row in rows]), 4))
    figures += [_spread(interval([getattr(row, name) for row in rows]), None) for name in ("features", "latent")]
    for flags in ([row.right for row in rows], [row.right_unsplit for row in rows]):
        figures.append("–" if None in flags else f"{sum(map(bool, flags))} of {len(flags)}")
    megabytes = (outcome.total_bytes_fp16 / 1e6, outcome.exposed_bytes_fp16 / 1e6)
    return setting + figures + [f"{value:,.2f}" for value in megabytes]


def _of_baseline(cell: Cell, pictures: dict[Cell, list[Picture]], baseline: str) -> list[Picture]:
    """The images that a cell is compared with: those of the baseline with as many exact steps."""
    for other, rows in pictures.items():
        same = (other.group, other.steps, other.ranks, other.exact) == (cell.group, cell.steps, cell.ranks, cell.exact)
        if same and other.strategy == baseline:
            return rows
    return []


def difference(rows: Sequence[Picture], against: Sequence[Picture]) -> tuple[float, float]:
    """The mean of the paired differences of PSNR in dB, and half the width of its 95 % interval."""
    theirs = {row.prompt: row.psnr for row in against}
    return interval([row.psnr - theirs[row.prompt] for row in rows])


def _spread(value: tuple[float, float], digits: int | None, sign: str = "") -> str:
    """`31.24 ± 0.85`; without `digits`, two significant digits of the mean, and as many decimals of the interval."""
    mean, half = value
    form = f"{sign}.{digits}f" if digits is not None else ".2g" if mean < 1e-3 else ".4f"
    return f"{mean:{form}}" if isnan(half) else f"{mean:{form}} ± {half:{form.removeprefix('+')}}"


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _order(cell: Cell) -> tuple[Any, ...]:
    return cell.group, cell.steps, cell.ranks, cell.warmup or 0, cell.strategy


# ------------------------------------------------------------------------------------------------ plots


def quality_plot(outcomes: Sequence[Outcome], pictures: dict[Cell, list[Picture]], path: Path) -> Path:
    """PSNR against bytes: filled marks for all bytes, hollow ones for awaited bytes."""

    def panel(axes: Any, members: list[Outcome], colours: dict[str, Any]) -> None:
        for each in members:
            assert each.total_bytes_fp16 is not None
            assert each.exposed_bytes_fp16 is not None
            total, exposed = each.total_bytes_fp16 / 1e6, each.exposed_bytes_fp16 / 1e6
            colour = colours[each.cell.label]
            if each.cell.warmup is None:
                axes.axvline(total, color=colour, linestyle="--", label=f"{each.cell.label} (≥ {CAP:.0f} dB)")
                continue
            mean, half = interval([row.psnr for row in pictures[each.cell]])
            axes.plot([exposed, total], [mean, mean], color=colour, alpha=0.4)
            axes.plot([exposed], [mean], "o", color=colour, markerfacecolor="white")
            spread = None if isnan(half) else half
            axes.errorbar(
                [total], [mean], yerr=spread, fmt="o", color=colour, capsize=3, label=each.cell.label, zorder=3
            )
        axes.set_xlim(0, 1.08 * axes.dataLim.xmax)

    return _panels(
        path,
        outcomes,
        lambda each: each.cell,
        panel,
        x="MB per picture, busiest rank, 2 bytes per float (● all, ○ exposed)",
        y="PSNR against unsplit, dB",
    )


def steps_plot(cells: Sequence[Cell], errors: dict[Cell, dict[int, list[float]]], path: Path) -> Path:
    """The mean relative error of the latents after each step. Exact strategies are left out if there are others."""
    means = {cell: [float(np.mean(errors[cell][step])) for step in sorted(errors[cell])] for cell in cells}
    stale = [value for cell in cells if cell.warmup is not None for value in means[cell][cell.warmup :]]

    def panel(axes: Any, members: list[Cell], colours: dict[str, Any]) -> None:
        for cell in members:
            if cell.warmup is not None or not stale:
                axes.plot(range(1, cell.steps + 1), means[cell], color=colours[cell.label], label=cell.label)
        axes.set_yscale("log")
        if stale:  # exact steps have rounding errors only, far below: cut them off
            axes.set_ylim(bottom=min(stale) / 2, top=max(stale) * 2)

    return _panels(path, cells, lambda cell: cell, panel, x="step", y="relative latent error, mean")


def _panels(
    path: Path,
    members: Sequence[Any],
    cell_of: Callable[[Any], Cell],
    panel: Callable[[Any, list[Any], dict[str, Any]], None],
    *,
    x: str,
    y: str,
) -> Path:
    """One panel per number of steps and of ranks, with one legend for all."""
    cells = [cell_of(each) for each in members]
    settings = sorted({(cell.steps, cell.ranks) for cell in cells})
    labels = sorted({cell.label for cell in cells})
    palette = mpl.colormaps["tab10" if len(labels) <= 10 else "tab20"]
    colours = {label: palette(i) for i, label in enumerate(labels)}
    columns = min(len(settings), COLUMNS)
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(max(4.4 * columns, 7.0), 3.2 * rows + 1.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(settings) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, setting in zip(grid.flat, settings, strict=False):
        inside = [each for each, cell in zip(members, cells, strict=True) if (cell.steps, cell.ranks) == setting]
        panel(axes, inside, colours)
        axes.set_title(f"{setting[1]} ranks, {setting[0]} steps", fontsize=10)
        axes.grid(alpha=0.3)
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    first = cells[0]
    figure.suptitle(f"{first.pipeline}, {first.size} x {first.size}, {first.prompts} prompts", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)
    return path


# ------------------------------------------------------------------------------------------------ contact sheets


def sheets(cells: Sequence[Cell], pictures: dict[Cell, list[Picture]], folder: Path) -> list[Path]:
    """For each number of steps and ranks: prompts as columns, the unsplit model and all strategies as rows."""
    settings: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        settings[cell.steps, cell.ranks].append(cell)
    written = []
    for (steps, ranks), members in settings.items():
        group = members[0].group
        rows: list[tuple[str, Path, list[Picture]]] = [
            ("unsplit", folder / "unsplit" / f"{group}-{steps}steps.png", []),
            *((cell.label, folder / "pictures" / f"{cell.slug}.png", pictures[cell]) for cell in members),
        ]
        prompts = [row.text for row in pictures[members[0]]]
        title = f"{members[0].pipeline}, {ranks} ranks, {steps} steps"
        path = folder / f"pictures-{group}-{steps}steps-{ranks}ranks.png"
        sheet(title, rows, prompts, members[0].size).save(path, optimize=True)
        written.append(path)
    return written


def sheet(title: str, rows: Sequence[tuple[str, Path, list[Picture]]], prompts: Sequence[str], size: int) -> Any:
    """Draw one row per strategy: a label, a file with images side by side, and their figures.

    Small images are enlarged by an integer factor; images that the reader finds wrong are marked."""
    large, small = ImageFont.load_default(15), ImageFont.load_default(12)
    factor = max(1, -(-PANEL // size))
    side, left = size * factor, 150
    shown = [Image.open(path).convert("RGB") for _, path, _ in rows]
    columns = shown[0].width // size
    headings = [textwrap.fill(text, side // 7) for text in prompts[:columns]]
    top = 40 + 16 * max(text.count("\n") + 1 for text in headings)
    down = side + 28
    canvas = Image.new("RGB", (left + columns * (side + 8), top + len(rows) * down), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((10, 8), title, "black", large)
    for k, text in enumerate(headings):
        pen.multiline_text((left + k * (side + 8), 34), text, "black", small, spacing=2)
    for i, ((label, _, figures), pictures) in enumerate(zip(rows, shown, strict=True)):
        y = top + i * down
        pen.multiline_text((10, y + 4), label.replace(", ", "\n"), "black", large)
        for k in range(columns):
            x = left + k * (side + 8)
            one = pictures.crop((k * size, 0, (k + 1) * size, size)).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(one, (x, y))
            if figures:
                wrong = figures[k].right is False
                text = f"{CAP:.0f} dB or more" if figures[k].psnr == CAP else f"{figures[k].psnr:.1f} dB"
                pen.text((x, y + side + 3), text + (", misread" if wrong else ""), WORSE if wrong else "dimgrey", small)
    return canvas
