"""The environment variable FXPASS_LOG: `FXPASS_LOG=debug` shows what the logger `fxpass` is told, on standard error."""

from __future__ import annotations

import difflib
import logging
import os

VARIABLE = "FXPASS_LOG"
LEVELS = ("debug", "info", "warning", "error")


def start() -> None:
    """Show messages of the level that the environment names; of an unknown level say so, and show warnings."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return
    log = logging.getLogger("fxpass")
    log.setLevel(name.upper() if known() else logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s fxpass %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    if not known():
        near = difflib.get_close_matches(name.lower(), LEVELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        log.warning("%s=%s: there is no such level; %sThe levels are %s", VARIABLE, name, hint, ", ".join(LEVELS))


def known() -> bool:
    """Whether the environment names a level that there is, or none."""
    return os.environ.get(VARIABLE, "").upper() in ("", *logging.getLevelNamesMapping())
