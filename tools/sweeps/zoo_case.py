"""Measure one case of the zoo: capture it, split it over several ranks, run it, and compare it with the unsplit model.

Inputs differ from those of the capture, except inputs that the program has read as Python values.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...capture import Call, CaptureError, GuardError, capture, unsplit
from ...capture.guards import broken_guard
from ...capture.structure import WeightTable
from ...ir.exchange import DISPLACED, Exchange
from ...ir.program import Program, calls
from ...ir.step import EXACT, Step
from ...ir.strategy import Strategy
from ...make_plan import make_plan
from ...models.case import Case
from ...models.zoo import kind_of, zoo_case
from ...passes.cuts import WorldSizeError
from ...plan import Plan
from ...runtime.lockstep import LockstepExecutor, Tamper

RANKS = (2, 3, 4, 8)
ROWS, COLS = 32, 16
CAPTURED, FRESH = 1, 7  #: seeds of the inputs
TOLERANCE = 1e-5  #: largest relative difference that counts as rounding in float32
VISIBLE = 1e-3  #: smaller relative changes show little
MOVED, AT_LIMITS = 0.05, 0.5  #: least share of an output that inputs must change; largest share that may be clamped
STALE = Step(exact=False, pace=1.0)


@dataclass(frozen=True)
class Split:
    """The result of a case on one number of ranks."""

    error: float = float("nan")  #: largest difference of any rank's output, over that output's largest value
    bound: float = 0.0  #: the speed-up that the slowest rank's work allows
    received: int = 0  #: bytes that the busiest rank receives in one exact step
    fallbacks: tuple[tuple[str, str], ...] = ()  #: module and reason
    refused: str = ""  #: why it cannot be split; the other fields are empty then

    @property
    def exact(self) -> bool:
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class Found:
    """The result of a case."""

    name: str
    key: str  #: hash of the sources that it was measured with
    kind: str = ""  #: the class that it stands for
    folder: str = ""  #: the folder of diffusers that has that class
    size: str = ""
    parameters: int = 0
    operators: int = 0
    read: tuple[tuple[str, str], ...] = ()  #: inputs that the model turns into Python values, and where
    scale: float = 0.0  #: the smallest root mean square of an output
    change: float = 0.0  #: smallest change of an output by other inputs, over its largest value
    blind: tuple[str, ...] = ()  #: why exactness says little about this case
    splits: dict[int, Split] = field(default_factory=dict)
    displaced: float | None = None  #: difference of a displaced step from the unsplit model on unchanged input
    bf16: float | None = None  #: RMS error of the split bfloat16 model over that of the unsplit one
    bf16_refused: str = ""
    refused: str = ""  #: why capture refuses the model
    failed: str = ""  #: what stopped the measurement
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(data: dict[str, Any]) -> Found:
        """The inverse of `plain`, also from JSON. Of a measurement that was stopped, there is little."""
        data = {"kind": data["name"]} | data
        splits = {
            int(n): Split(**each | {"fallbacks": tuple(map(tuple, each["fallbacks"]))})
            for n, each in data.get("splits", {}).items()
        }
        lists = {"read": tuple(map(tuple, data.get("read", ()))), "blind": tuple(data.get("blind", ()))}
        given: dict[str, Any] = data | {"splits": splits} | lists
        return Found(**given)


@dataclass(frozen=True)
class Subject:
    """A captured model, a call with other inputs, and the unsplit model's answer to it."""

    module: nn.Module
    program: Program
    call: Call
    expected: list[Tensor]

    def run(self, plan: Plan, *steps: Step, tamper: Tamper | None = None) -> list[list[Tensor]]:
        """The outputs of each rank at the last step."""
        return list(self.runs(plan, *((self.call, step) for step in steps), tamper=tamper))[-1]

    @torch.no_grad()
    def runs(self, plan: Plan, *steps: tuple[Call, Step], tamper: Tamper | None = None) -> Iterator[list[list[Tensor]]]:
        """The outputs of each rank at each step."""
        weights = WeightTable(self.module, list(plan.program.weights.values())).tensors()
        loaded = LockstepExecutor(plan.world_size, tamper=tamper, check=True).load(plan, weights, self.call.tensors)
        for call, step in steps:
            yield loaded.run_all(weights, call.tensors, step)

    def error(self, ranks: list[list[Tensor]]) -> float:
        """The largest difference of any rank's outputs; NaN if an output has one."""
        return max((difference(a, b) for found in ranks for a, b in zip(found, self.expected, strict=True)), key=_worst)


def measure(name: str, key: str) -> Found:
    """Measure everything about one case. An error that stops the measurement becomes part of the result."""
    started = time.perf_counter()
    case = zoo_case(name)
    facts: dict[str, Any] = {"kind": case.covers or name}
    try:
        for some in _facts(case):
            facts |= some
    except (CaptureError, GuardError) as error:
        facts["refused"] = _sentence(error)
    except Exception as error:
        traceback.print_exc()
        facts["failed"] = _sentence(error)
    return Found(name, key, **facts, seconds=time.perf_counter() - started)


def plain(name: str, key: str) -> dict[str, Any]:
    """The same as plain data."""
    return measure(name, key).plain()


def _facts(case: Case) -> Iterator[dict[str, Any]]:
    module = case.build()
    rows, cols = (max(case.multiple, size - size % case.multiple) for size in (ROWS, COLS))
    kind, folder = kind_of(case, module)
    yield {
        "kind": kind,
        "folder": folder,
        "size": f"{rows} x {rows if case.square else cols}",
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    given, fresh = (case.inputs(rows, seed=seed, cols=cols, module=module) for seed in (CAPTURED, FRESH))
    subject = captured(module, given, fresh)
    yield _of_program(subject, given)
    splits: dict[int, Split] = {}
    for n in RANKS:
        splits[n] = split(subject, n)
        yield {"splits": splits}
    if not splits[RANKS[0]].refused:
        yield {"displaced": displaced(subject, Call.of(module, (), given))}
        yield _in_bf16(case, given, fresh)
        unseen = tuple(idle(subject))
        yield {
            "blind": (*blind(subject.expected, answer(module, Call.of(module, (), given), subject.program)), *unseen)
        }


def captured(module: nn.Module, given: dict[str, Any], fresh: dict[str, Any]) -> Subject:
    """Capture the model with `given`, and build a call with `fresh` inputs.

    Inputs that the program has read as Python values keep their values: others would need another program.
    """
    program = capture(module, **given)
    old, call = Call.of(module, (), given), Call.of(module, (), fresh)
    read = {path for guard in program.guards for path in guard.path.split(", ")}
    tensors = [a if path in read else b for path, a, b in zip(call.paths, old.tensors, call.tensors, strict=True)]
    call = Call.of(module, (), call.rebuild(call.with_numbers(tensors)))
    if old.key != call.key or broken_guard(program, module, call.tensors) is not None:
        raise AssertionError("the fresh inputs need another program")
    if all(map(torch.equal, old.tensors, call.tensors)):
        raise AssertionError("there are no fresh inputs: the model turns all of them into Python values")
    return Subject(module, program, call, answer(module, call, program))


@torch.no_grad()
def answer(module: nn.Module, call: Call, program: Program | None = None) -> list[Tensor]:
    """The outputs of the unsplit model, what it leaves behind (if its program is given), and what it writes to."""
    return unsplit(module, call, program)


def split(subject: Subject, ranks: int) -> Split:
    """Run an exact step on `ranks` ranks."""
    try:
        plan = make_plan(subject.program, ranks, Strategy.of("sync"))
    except WorldSizeError as error:
        return Split(refused=_sentence(error))
    received = max(sum(roles.values()) for roles in plan.bytes_received_per_rank)
    fallbacks = tuple(dict.fromkeys((each.path or "the model", each.reason) for each in plan.fallbacks))
    return Split(subject.error(subject.run(plan, EXACT)), plan.bound, received, fallbacks)


def displaced(subject: Subject, other: Call) -> float:
    """The error of a displaced step on unchanged inputs; on changed inputs all ranks must agree."""
    plan = make_plan(subject.program, RANKS[0], Strategy.of("displaced"))
    exact, stale = (subject.call, EXACT), (subject.call, STALE)
    *_, rest, moved = subject.runs(plan, exact, exact, stale, stale, (other, STALE))
    if not all(torch.equal(a, b) for ranks in moved[1:] for a, b in zip(ranks, moved[0], strict=True)):
        raise AssertionError("ranks return different outputs at a displaced step")
    return subject.error(rest)


def blind(found: Sequence[Tensor], other: Sequence[Tensor]) -> Iterator[str]:
    """Outputs that would look right even if much were wrong, from the outputs for two sets of inputs."""
    for i, (a, b) in enumerate((a.double(), b.double()) for a, b in zip(found, other, strict=True)):
        scale = a.square().mean().sqrt()
        moved = ((a - b).abs() > VISIBLE * scale).double().mean().item()
        at_limits = ((a == a.amax()) | (a == a.amin())).double().mean().item()
        if not (scale > 0 and a.isfinite().all()):
            yield f"output {i} is zero, or not finite"
        elif moved < MOVED:
            yield f"output {i} has {1 - moved:.0%} of its elements the same, whatever the inputs"
        elif at_limits > AT_LIMITS and a.numel() > 4:
            yield f"output {i} has {at_limits:.0%} of its elements at its smallest or largest value"


def idle(subject: Subject) -> Iterator[str]:
    """Kinds of exchanges that hardly change an output even if all payloads are noise."""
    plan = make_plan(subject.program, RANKS[0], Strategy.of("sync"))
    for role in sorted({each.role for each in plan.exchanges} & set(DISPLACED)):

        def noise(node: str, at: Exchange, src: int, dst: int, payload: Tensor, role: str = role) -> Tensor:
            if at.role != role:
                return payload
            if not payload.is_floating_point():
                return payload.roll(1) if payload.numel() > 1 else payload + 1
            spread = payload.std(correction=0)  # no noise for a single number
            return torch.randn_like(payload) * spread + payload.mean() if spread else 2 * payload + 1

        if (error := subject.error(subject.run(plan, EXACT, tamper=noise))) < VISIBLE:
            yield f"noise in place of all {role} changes outputs by {error:.0e} only"


def difference(found: Tensor, expected: Tensor) -> float:
    """max abs difference / max abs."""
    a, b = found.double(), expected.double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def _of_program(subject: Subject, given: dict[str, Any]) -> dict[str, Any]:
    other = answer(subject.module, Call.of(subject.module, (), given), subject.program)
    read = {(guard.path, guard.line.rpartition("/")[2]) for guard in subject.program.guards}
    return {
        "operators": sum(1 for _ in calls(subject.program.graph)),
        "read": tuple(sorted(read)),
        "scale": min(each.double().square().mean().sqrt().item() for each in subject.expected),
        "change": min(map(difference, other, subject.expected)),
    }


def _in_bf16(case: Case, given: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Compare the split with the unsplit model in bfloat16, each by its distance from the same weights in float32."""
    module = case.build().to(torch.bfloat16)
    exact = case.build().to(torch.bfloat16).float()
    given, fresh = (_cast(inputs, torch.bfloat16) for inputs in (given, fresh))
    try:
        subject = captured(module, given, fresh)
    except Exception as error:
        return {"bf16_refused": _sentence(error)}
    same = subject.call.rebuild(subject.call.with_numbers(subject.call.tensors))
    wider = Call.of(exact, (), _cast(same, torch.float32))
    changes = subject.program.changes
    program = capture(exact, **wider.arguments) if any(change.held is not None for change in changes) else None
    wanted = answer(exact, wider, program)
    found = subject.run(make_plan(subject.program, RANKS[0], Strategy.of("sync")), EXACT)
    ratios = [
        _rms(a, b) / max(_rms(c, b), 1e-30)
        for rank in found
        for a, b, c in zip(rank, wanted, subject.expected, strict=True)
    ]
    return {"bf16": max(ratios, key=_worst)}


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return torch.utils._pytree.tree_map(cast, tree)


def _rms(found: Tensor, expected: Tensor) -> float:
    return (found.double() - expected.double()).square().mean().sqrt().item()


def _worst(value: float) -> float:
    return value if value == value else float("inf")


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
