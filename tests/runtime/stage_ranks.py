"""What each process of test_stages.py runs under torchrun: `python -m tests.runtime.stage_ranks FOLDER`.

Writes what it saw to FOLDER/<process>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fxpass.ir.strategy import Strategy
from tests.runtime.patch_ranks import equal, parallel

AT_ONCE: dict[str, Any] = {"strategy": "asyncdiff", "warmup_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"stages": 2},
    "with patches": {"stages": 2, "patches": 2},
    "at once": {"stages": 2, **AT_ONCE},
    "at once, with stale patches": {
        "stages": 2, "patches": 2, "strategy": Strategy("both", "stale", "stale", "stale", transfers="stale"),
        "warmup_steps": 2,
    },
}  # fmt: skip


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, options in WAYS.items():
        with parallel(None, timeout=60, **options) as module:
            found[name] = equal(module, parallel(2, executor="lockstep", **options))
            channels = module._engine.programs.all()[0].loaded.steps.runners[0].channels(0)
            found["kinds"] = sorted({type(channel.between).__name__ for channel in channels if channel.between})
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
