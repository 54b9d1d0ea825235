"""Run `fxpass …` in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from fxpass.tools.commands.app import app


def fxpass(*arguments: Any) -> Any:
    """Returns `.exit_code`, `.stdout`, `.stderr`; raises errors that the command does not handle."""
    wide = {"COLUMNS": None}  # libraries set it in the environment: tables would be as narrow as they say
    result = CliRunner().invoke(app, list(map(str, arguments)), env=wide)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
