"""What a bug report needs, in one zip file."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..inspect.store import to_json
from ..inspect.text import text
from .facts import Facts
from .page import page, versions


def bundle(command: str, log: str, facts: Facts | None = None) -> bytes:
    """A zip file with the versions, the log, the page, the plan, the prediction and a dump of one rank.

    Nothing in it is of weights, prompts or pictures.

    Args:
        command: how the user asked for it.
        log: messages of the logger `fxpass`, and the traceback of an error.
        facts: None if there is no plan, because of the error.
    """
    held = {"versions.json": json.dumps({"command": command, **versions()}, indent=2), "log.txt": log}
    if facts is not None:
        held |= {
            "report.html": page(facts),
            "plan.json": json.dumps(facts.plan.describe(), indent=2),
            "prediction.json": json.dumps(facts.prediction.describe(facts.steps), indent=2),
            "dump.json": to_json(facts.snapshot),
            "dump.txt": text(facts.snapshot),
        }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in held.items():
            archive.writestr(f"fxpass-report/{name}", content + "\n")
    return file.getvalue()


@contextmanager
def recorded() -> Iterator[io.StringIO]:
    """All messages of the logger `fxpass`, as text."""
    log, buffer = logging.getLogger("fxpass"), io.StringIO()
    handler, level = logging.StreamHandler(buffer), log.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    others = [(each, each.level) for each in log.handlers]
    for each, of_it in others:
        each.setLevel(max(of_it, log.getEffectiveLevel()))  # what the terminal shows stays the same
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield buffer
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        for each, of_it in others:
            each.setLevel(of_it)
