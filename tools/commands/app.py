"""The subcommands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import Commands, Subcommand
from ..progress import shown
from .calibrate import calibrate
from .check import check
from .dump import dump
from .explain import explain
from .generate import generate
from .models import models
from .plan import plan
from .report import report
from .study import study
from .trace import trace

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (generate, plan, dump, explain, report, trace, calibrate, check, study, models):
    app.command(cls=Subcommand)(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fxpass {version('fxpass')}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="FXPASS_TRACEBACK", help="Show the traceback of expected errors too.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress; also after the command's name.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Make any diffusion denoiser patch-parallel."""
    context.with_resource(shown(quiet=quiet))
