"""Dumps and plans of three small models as they shall be: `python -m tests.inspect.golden` writes them anew.

Each line that a change of the compiler changes there is one that a user sees differently: read the diff. The models are
those of this repository, so that other versions of libraries change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxpass.inspect.text import text
from fxpass.make_plan import plan
from fxpass.plan import Plan
from tests.outside.cases import outsiders
from tests.runtime.plans import block, inputs

FOLDER = Path(__file__).parent / "golden"
UNSTABLE = ("seconds", "fingerprint")  #: times, and a hash that names operators as torch's version does


def _outsider(name: str, world: int, strategy: str) -> Plan:
    (chosen,) = (each for each in outsiders if each.name == name)
    args, kwargs = chosen.arguments(chosen.rows)
    return plan(chosen.build(chosen.rows), *args, world_size=world, strategy=strategy, **kwargs)


PLANS: dict[str, Callable[[], Plan]] = {
    "block": lambda: plan(block(), *inputs(), world_size=2, strategy="displaced"),
    "uvit": lambda: _outsider("uvit", 2, "sync"),
    "linear_attention": lambda: _outsider("linear_attention", 3, "compressed"),
}


def files(name: str) -> dict[str, str]:
    """The golden files of a model, by name."""
    made = PLANS[name]()
    described: dict[str, Any] = {key: value for key, value in made.describe().items() if key not in UNSTABLE}
    last = made.snapshot(made.world_size - 1, name)
    return {
        f"{name}.txt": text(last) + "\n",
        f"{name}_unfolded.txt": text(last, folded=False) + "\n",
        f"{name}.json": json.dumps(described, indent=1) + "\n",
    }


if __name__ == "__main__":
    for model in PLANS:
        for file, content in files(model).items():
            FOLDER.mkdir(exist_ok=True)
            FOLDER.joinpath(file).write_text(content)
