"""Plans in files, so that a later start captures and partitions a model without a search for cuts.

A file is JSON. It has one entry for each signature (shapes and options of a call), world size, number of groups and
strategy::

    {"schema": "fxpass.plans", "version": 3, "plans": [
      {"fxpass": "0.2.0", "torch": "2.13.0", "inputs": ["sample (1, 4, 64, 64) torch.float32", ...],
       "program": fingerprint of the whole program, "world_size": 4, "groups": 1,
       "copies": 1, "strategy": {fields of Strategy},
       "cuts": {value: {"dim": 2, "rows": [runs of each rank]}}, "plan": fingerprint of the plan,
       "counts": ranks of each process; [] if each has one, "speeds": of the ranks of a stage; [] if all are the same,
       "stages": of each group}]}
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .inspect.files import locked, replacing
from .inspect.store import from_layout, read, to_layout
from .ir.layout import Layout
from .ir.program import Program, fingerprint
from .ir.strategy import Strategy
from .ir.versions import versions
from .passes import build
from .passes.normalize import normalize
from .passes.targets import Target
from .plan import Plan
from .planning import Deal
from .runtime.calls.programs import NoPlanError

SCHEMA = "fxpass.plans"
VERSION = 4  #: of the schema


@dataclass(frozen=True)
class SavedPlan:
    """An entry of a file; the module's docstring says what its fields are."""

    fxpass: str
    torch: str
    inputs: tuple[str, ...]
    program: str
    world_size: int
    groups: int
    copies: int
    strategy: Strategy
    cuts: dict[str, Layout]
    plan: str
    counts: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()
    stages: int = 1

    @property
    def deal(self) -> Deal:
        """How the stages and the patches of a group are dealt to its processes."""
        return Deal(self.counts, self.speeds, self.stages)

    @property
    def processes(self) -> int:
        return len(self.counts) or self.world_size

    @property
    def patches(self) -> int:
        """Of each group."""
        return self.world_size // self.groups // self.stages

    @staticmethod
    def of(plan: Plan) -> SavedPlan:
        whole = plan.program
        inputs, cuts = tuple(_inputs(whole)), dict(plan.cuts)
        ranks = plan.world_size, plan.groups, plan.copies
        return SavedPlan(
            *versions(),
            inputs,
            fingerprint(whole.graph),
            *ranks,
            plan.strategy,
            cuts,
            plan.fingerprint,
            plan.counts,
            plan.speeds,
            plan.stages,
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells entries of one file apart."""
        return self.program, self.world_size, self.deal, self.groups, self.copies, self.strategy


def save(plan: Plan, path: str | Path) -> None:
    """Write a plan to a file; entries of other signatures, world sizes, groups and strategies stay.

    Several processes may write to one file.
    """
    path = Path(path)
    new = SavedPlan.of(plan)
    with locked(path):
        kept = [each for each in load(path) if each.key != new.key] if path.exists() else []
        text = json.dumps(
            {"schema": SCHEMA, "version": VERSION, "plans": [_to_json(each) for each in [*kept, new]]}, indent=1
        )
        with replacing(path) as part:
            part.write_text(text + "\n")


def load(path: str | Path) -> tuple[SavedPlan, ...]:
    """The plans in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no plans, or those of another version of the schema.
    """
    data = read(Path(path).read_text(), SCHEMA, VERSION, str(path), f"{path} holds no plans of fxpass")
    try:
        return tuple(map(_from_json, data["plans"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def plan_again(program: Program, plans: Sequence[SavedPlan], target: Target) -> Plan:
    """The plan of a captured program by the entry that fits it, without a search.

    Raises:
        ValueError: no entry was made for this program by these versions, or it gives another plan now.
    """
    started = time.perf_counter()
    whole, here = fingerprint(normalize(program).graph), versions()
    fitting = [each for each in plans if each.program == whole and (each.fxpass, each.torch) == here]
    if not fitting:
        raise NoPlanError(_misfit(program, plans, here))
    saved = fitting[0]
    ranks, groups, copies = saved.world_size, saved.groups, saved.copies
    result = build(
        program,
        ranks,
        target,
        saved.strategy,
        groups=groups // copies,
        copies=copies,
        cuts=saved.cuts,
        stages=saved.stages,
    )
    assert result.graph is not None
    seconds = result.program.seconds | {"plan": time.perf_counter() - started}
    cuts = dict(saved.cuts)
    plan = Plan(
        result.program,
        result.graph,
        ranks,
        saved.strategy,
        target,
        cuts,
        seconds,
        groups=groups,
        copies=copies,
        counts=saved.counts,
        speeds=saved.speeds,
        stages=saved.stages,
    )
    if plan.fingerprint != saved.plan:
        raise NoPlanError("these cuts give another plan than when they were saved; make it anew (Plan.save)")
    return plan


def _misfit(program: Program, plans: Sequence[SavedPlan], here: tuple[str, str]) -> str:
    """Why no entry fits a program."""
    inputs = tuple(_inputs(program))
    alike = [each for each in plans if each.inputs == inputs]
    if not alike:
        known = "; ".join(", ".join(each.inputs) for each in plans)
        return f"no saved plan is for inputs {', '.join(inputs)}; there are plans for: {known}"
    made = [(each.fxpass, each.torch) for each in alike]
    if here in made:
        return "the saved plan is of another model, or of one with other layers, adapters or options; make it anew"
    fx, torch_ = made[0]
    return (
        f"this plan was made by fxpass {fx} and torch {torch_}, here are {here[0]} and {here[1]}; make it anew "
        "(Plan.save)"
    )


def _inputs(program: Program) -> list[str]:
    """The inputs as text, each with name, shape and dtype."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    metas = [nodes[name].meta for name in program.inputs]
    return [f"{p} {tuple(m['shape'])} {m['dtype']}" for p, m in zip(program.input_paths, metas, strict=True)]


def _to_json(saved: SavedPlan) -> dict[str, Any]:
    cuts = {name: from_layout(layout) for name, layout in saved.cuts.items()}
    return {each.name: getattr(saved, each.name) for each in fields(saved)} | {
        "strategy": asdict(saved.strategy),
        "cuts": cuts,
    }


def _from_json(data: dict[str, Any]) -> SavedPlan:
    strategy = data["strategy"]
    if isinstance(strategy["window"], list):
        strategy["window"] = tuple(strategy["window"])
    values = {each.name: data[each.name] for each in fields(SavedPlan)}
    values["inputs"] = tuple(values["inputs"])
    for name in ("counts", "speeds"):
        values[name] = tuple(values[name])
    values["strategy"] = Strategy(**strategy)
    values["cuts"] = {name: to_layout(layout) for name, layout in data["cuts"].items()}
    saved = SavedPlan(**values)
    ranks = saved.world_size, saved.groups, saved.copies, saved.stages
    whole = all(isinstance(each, int) and each > 0 for each in ranks)
    if not whole or ranks[0] % (ranks[1] * ranks[3]) or ranks[1] % ranks[2]:
        raise ValueError(
            f"{ranks[0]!r} ranks in {ranks[1]!r} groups, of which {ranks[2]!r} do the same, of {ranks[3]!r} stages"
        )
    return saved
