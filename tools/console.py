"""What the commands share: options, the console, and errors as one line."""

from __future__ import annotations

import math
import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

format_warning = warnings.formatwarning

MODEL = "a catalog name (see `fxpass models`), small:NAME, a diffusers folder, or package.module:factory"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
World = Annotated[int, typer.Option("--world-size", "-n", min=1, help="Ranks.")]
StrategyName = Annotated[str, typer.Option("--strategy", help="How fresh the exchanges are.")]
TargetName = Annotated[
    str,
    typer.Option("--target", help="What to plan for: auto, cpu, gpu, H100, …, or a file of `fxpass calibrate`."),
]
LinkName = Annotated[
    str | None,
    typer.Option("--link", metavar="NAME", help="What joins the ranks: nvlink4, pcie4, ….", show_default=False),
]
Cfg = Annotated[
    int,
    typer.Option("--cfg", min=1, help="Groups of ranks for the guidance branches of a batch."),
]
Data = Annotated[int, typer.Option("--data", min=1, help="Groups of ranks for the prompts of a batch.")]
Patches = Annotated[
    int | None,
    typer.Option("--patches", min=1, help="Patches of each group, run by its processes in turn.", show_default=False),
]
Speeds = Annotated[
    list[float] | None,
    typer.Option("--speed", metavar="NUMBER", help="Speed of a process; once for each of a group.", show_default=False),
]
Stages = Annotated[
    int, typer.Option("--stages", min=1, help="Parts of the model's depth; each is run by processes of its own.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps of a generation.")]
Graphs = Annotated[bool, typer.Option("--graphs", help="Launch kernels as CUDA graphs, not one by one.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse models with operators that cannot be split.")]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels of the output (small:NAME: rows of the latent).")]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels of the output (small:NAME: columns of the latent).")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of video.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Samples per call, guidance branches counted.")]


#: a wrong option or argument: of click, or of the copy of click in newer versions of typer
UsageError: Any = typer.BadParameter.__base__


def rank() -> int:
    """The rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", "0"))


def console() -> Console:
    """The console for results: the terminal's width, or 160 columns in a file or pipe; silent on ranks other than 0."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    return Console(width=width, highlight=False, markup=False, emoji=False, quiet=rank() > 0)


class _ErrorsInOneLine:
    """Prints errors that the user can correct as one red line, without a traceback, and exits with 2."""

    no_args_is_help: bool

    def make_context(self, info_name: Any, args: list[str], *others: Any, **more: Any) -> Any:
        asked = [*args]
        try:
            return super().make_context(info_name, args, *others, **more)
        except UsageError as error:
            if not asked and self.no_args_is_help:
                raise  # the help has been shown
            _fail(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `fxpass dump … | head`: the reader has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            _fail(error)


def warning_text(message: Any, category: type[Warning], *place: Any) -> str:
    """A warning as `warnings` shows it; one of this package in one line, without a line of source."""
    from ..ir.advice import FxpassWarning

    if issubclass(category, FxpassWarning):
        return f"warning: {message}\n"
    return format_warning(message, category, *place)


def _fail(error: Exception) -> NoReturn:
    """Print an error and exit with 2; raise it if its traceback is useful."""
    text = message(error)
    if text is None:
        raise error
    who = f"rank {rank()}: " if "RANK" in os.environ else ""
    typer.secho(f"error: {who}{text}", fg="red", err=True)
    raise typer.Exit(2) from None


class Commands(_ErrorsInOneLine, TyperGroup):
    """Several commands. `--quiet` may stand before the command's name or after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        quiet = [each for each in args if each == "--quiet"]
        return super().parse_args(ctx, [*quiet, *(each for each in args if each != "--quiet")])


class Subcommand(TyperCommand):
    """A command whose options are finite numbers: to Python, "nan" and "inf" are numbers, too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        context = super().make_context(*args, **kwargs)
        for each in self.params:
            value = context.params.get(each.name or "")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"Invalid value for '{each.opts[0]}': {value} is not a finite number.", context)
        return context


class Command(_ErrorsInOneLine, Subcommand):
    """A program that is one command."""


def message(error: Exception) -> str | None:
    """The text of an error that the user can correct; None for others, whose traceback is useful."""
    from ..capture import CaptureError, GuardError
    from ..extras import missing
    from ..runtime.errors import DisagreementError, RankError

    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx is not None else "fxpass"
        return f"{' '.join(error.format_message().split())} (see `{command} --help`)"
    if isinstance(error, RankError):
        last = error.message.strip().splitlines()[-1]
        return f"rank {error.rank} failed: {last}" if error.rank is not None else last
    if isinstance(error, ModuleNotFoundError) and (hint := missing(error)) is not None:
        return str(hint)
    if isinstance(error, (CaptureError, GuardError, DisagreementError)):
        return str(error)
    if isinstance(error, (ValueError, NotImplementedError, OSError)) or type(error) is LookupError:
        module = _raised_in(error)
        if module.startswith("fxpass."):
            return str(error)
        return f"{type(error).__name__} in {module}: {error} (fxpass --traceback … shows where)"
    return None


def _raised_in(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "?") if trace else "?"
