"""The environment variable FXPASS_LOG: `FXPASS_LOG=debug` shows what the logger `fxpass` is told, on standard error."""

from __future__ import annotations

import logging
import os

VARIABLE = "FXPASS_LOG"


def start() -> None:
    """Show messages of the level that the environment names.

    Raises:
        ValueError: there is no such level.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        return
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        raise ValueError(f"{VARIABLE}={name}: there is no such level; the levels are debug, info, warning and error")
    log = logging.getLogger("fxpass")
    log.setLevel(levels[name.upper()])
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s fxpass %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
