"""Decide which steps are exact. A displaced step needs every sign that a call continues a generation.

Calls of one generation (`generation.py`) with equal conditioning (all inputs but sample and timestep) belong to one
*context*: one guidance branch of one prompt. Of a generation that the user entered, every call continues its context.
Else a call does so if

- no timestep has risen (a new generation starts high again; where a pipeline counts upwards from its scheduler's first
  timestep: none has fallen), come three times (Heun and PNDM repeat them once, though
  not the first) or fallen by several times as much as at the step before (a generation that begins in the middle),
- the sample correlates with the last one (fresh noise does not, even at a lower timestep), and
- the context was used not long ago.

Otherwise a generation begins, whose first `warmup_steps` calls are exact. If nobody announced the generation, a call at
the timestep of the one before, and the call after that, are exact as well: two loops of one prompt may take turns.

Ranks compare what they know of a call and of the calls before, and decide by what rank 0 knows (`agreement.py`). The
last `cooldown_steps` timesteps of a generation are exact as well, if its timesteps are known and the model's timestep
is one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ir.inputs import moving
from ...ir.program import Program
from ...ir.step import EXACT, Step
from ..executor import on_host
from .generation import Generation

CONTEXTS = 4  #: kept at once; guidance has two or three branches
MAX_GAP = 8  #: calls since a context was last used, beyond which it no longer continues
MIN_CORRELATION = 0.5  #: of a sample with the one before; independent noise has 0, most samplers' steps above 0.9
UNITS = (1.0, 1e-3)  #: factors that pipelines apply to the scheduler's timesteps before they call the model
FIRST = 1000.0  #: the timestep of noise alone, from which some pipelines count upwards
TOLERANCE = 0.01  #: relative difference below which two timesteps are equal: bfloat16 has 8 significant bits
MAX_FALL = (
    3.0  #: a larger fall of the timestep, in units of its last fall, begins a generation; samplers stay below 2.5
)
MAX_PACE = 2.0  #: upper limit of `Step.pace`


@dataclass
class Context:
    """A guidance branch in the middle of a generation."""

    number: int
    generation: Generation
    conditioning: list[Tensor]
    timestep: list[float]
    sample: Tensor
    call: int  #: when it was last used
    steps: int = 1  #: calls of this generation so far
    repeated: bool = False  #: its last timestep was the one before
    doubtful: bool = False  #: the same, also of a call that began a generation; and nobody announced any
    shared: bool = False  #: several calls came at one timestep, and inputs that are not compared may tell them apart
    broken: bool = False  #: the last step failed
    stride: float = 0.0  #: by how much the timestep fell at its last call; 0 at the first
    fall: float = 0.0  #: the last stride that is not 0
    left: list[float] = field(default_factory=list)  #: the timesteps of its generation, the last first; empty: unknown
    rises: bool = False  #: they rise from step to step
    why: str = ""  #: why it began in the middle of a generation; empty if it did not


@dataclass
class Clock:
    """Decides how to run the calls of one captured program.

    Args:
        timestep: the index of the timestep among the inputs; None if there is none: then every step is exact.
        sample: the index of the sample among the inputs.
        warmup_steps: exact steps at the beginning of a generation, at least one.
        cooldown_steps: exact steps at its end.
        names: of the inputs, for messages.
        others: the indices of inputs that are no conditioning either.
        fed: some of these are made by another part of the pipeline, and may be all that tells two calls apart.
    """

    timestep: int | None
    sample: int
    warmup_steps: int
    cooldown_steps: int = 0
    names: Sequence[str] = ()
    others: frozenset[int] = frozenset()
    fed: bool = False
    contexts: list[Context] = field(default_factory=list)
    calls: int = 0

    @staticmethod
    def of(program: Program, warmup_steps: int, cooldown_steps: int = 0) -> Clock:
        """A clock for the inputs of a program."""
        found = moving(program)
        if found is None:
            return Clock(None, 0, warmup_steps)
        paths = program.input_paths
        warmup_steps, fed = max(1, warmup_steps), bool(program.fed)
        return Clock(found.timestep, found.sample, warmup_steps, cooldown_steps, paths, found.others, fed)

    def facts(self, tensors: Sequence[Tensor], generation: Generation) -> list[Tensor]:
        """What `step` reads of a call's inputs, without a wait for their device: float64 [n] each.

        First the timestep; then of each context, by its number: whether the conditioning is equal, and whether the
        sample correlates.
        """
        if self.timestep is None:
            return []
        sample = tensors[self.sample].detach()
        conditioning = self._conditioning(tensors)
        seen = {c.number: c for c in self.contexts if c.generation is generation}
        signs = [_signs(seen.get(number), conditioning, sample) for number in range(CONTEXTS)]
        time = tensors[self.timestep].detach().double()
        if time.ndim > 1:  # of each frame or token: the largest of a sample tells how far it is
            time = time.flatten(1).amax(1)
        return [time.flatten(), torch.stack(signs).flatten()]

    def step(self, tensors: Sequence[Tensor], generation: Generation, values: Sequence[float] | None = None) -> Step:
        """How to run a call of a generation with these inputs.

        Args:
            values: the numbers in `facts`; None to read them.
        """
        self.calls += 1
        if self.timestep is None:
            return EXACT
        if values is None:
            values = on_host(self.facts(tensors, generation))
        count = len(values) - 2 * CONTEXTS
        time, signs = list(values[:count]), values[count:]
        sample = tensors[self.sample].detach()
        conditioning = self._conditioning(tensors)
        doubtful = False
        for context in self.contexts:
            if context.generation is generation and signs[2 * context.number]:
                broken = self._broken(context, time, bool(signs[2 * context.number + 1]))
                continued = not broken
                context.why = context.why if continued else broken
                context.rises = continued and self._rises(context, time)
                context.steps = context.steps + 1 if continued else 1
                doubtful = context.doubtful
                context.doubtful = not generation.announced and time == context.timestep
                context.repeated = continued and time == context.timestep
                context.shared = self.fed and (time == context.timestep or (continued and context.shared))
                last, context.stride = context.stride, _mean(context.timestep) - _mean(time) if continued else 0.0
                context.fall = context.stride or (context.fall if continued else 0.0)
                pace = min(context.stride / last, MAX_PACE) if last else 0.0
                break
        else:
            context, pace = self._new(generation, time, conditioning, sample), 0.0
        self.contexts.remove(context)
        self.contexts.append(context)  # the latest last
        context.timestep, context.sample, context.call = time, sample.clone(), self.calls
        if context.steps == 1:
            context.left = _timesteps(time, generation.timesteps)
            context.rises = not context.left
        if context.steps <= 2 and context.rises:  # the first may be 0, which is the same in all units
            context.left = _timesteps(time, generation.timesteps, rises=True)
            context.rises = bool(context.left)
        context.broken = False
        why = ""
        if any(_same(_mean(time), each) for each in context.left[: self.cooldown_steps]):
            why = f"the last steps are exact (cooldown_steps is {self.cooldown_steps})"
        if context.steps <= self.warmup_steps:
            why = context.why or f"the first steps are exact (warmup_steps is {self.warmup_steps})"
        elif doubtful or context.doubtful:
            why = "a timestep came twice, and nobody said which calls belong together (`module.generation` does)"
        elif context.shared:
            why = "several calls came at one timestep, with inputs that other parts of the pipeline have made"
        generation.count(why, last=bool(context.left) and _same(_mean(time), context.left[0]))
        return Step(context.number, bool(why), pace)

    def digest(self, generation: Generation) -> int:
        """A number below 2 ** 48 that tells apart what `step` reads beside a call's facts."""
        contexts = [
            (c.number, c.generation is generation, c.generation.ended, c.generation.sure, c.steps, c.call, c.timestep,
             c.repeated, c.doubtful, c.shared, c.broken, c.stride, c.fall, c.left, c.rises, c.why)
            for c in self.contexts
        ]  # fmt: skip
        text = repr((self.calls, generation.announced, list(generation.timesteps), contexts))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])

    def forget(self) -> None:
        """Forget all contexts: the ranks have run different calls."""
        self.contexts.clear()
        self.calls = 0

    def restart(self) -> None:
        """Read no earlier state: a step has failed."""
        for context in self.contexts:
            context.broken = True

    def _conditioning(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs beside those that move."""
        return [tensor for i, tensor in enumerate(tensors) if self._is_conditioning(i)]

    def _is_conditioning(self, i: int) -> bool:
        return i not in (self.timestep, self.sample) and i not in self.others

    def _broken(self, context: Context, time: list[float], correlates: bool) -> str:
        """Why a call does not continue a context; empty if it does.

        Args:
            correlates: whether its sample does with the last one.
        """
        if context.broken:
            return "a step failed"
        if context.generation.sure:
            return ""
        rises = self._rises(context, time)
        if not all(now >= then if rises else now <= then for now, then in zip(time, context.timestep, strict=True)):
            return "the timestep fell" if rises else "the timestep rose"
        if time == context.timestep and (context.repeated or context.steps == 1):
            return "a timestep came again"
        if context.fall and abs(_mean(context.timestep) - _mean(time)) > MAX_FALL * abs(context.fall):
            return "the timestep fell much further than before"
        if self.calls - context.call > MAX_GAP:
            return "many other calls came between"
        return "" if correlates else "the sample changed too much between two steps, as if another picture began"

    def _rises(self, context: Context, time: list[float]) -> bool:
        """Whether timesteps rise in a context; the second one shows whether they do as expected."""
        return context.rises and (context.steps > 1 or _mean(time) >= _mean(context.timestep))

    def _new(self, generation: Generation, time: list[float], conditioning: list[Tensor], sample: Tensor) -> Context:
        """A context for new conditioning; replaces one that is no longer used, or the oldest of `CONTEXTS`."""
        why = self._changed(generation, time, conditioning)
        left = [c for c in self.contexts if c.generation.ended or self._left(c, time)]
        number = len(self.contexts)
        if left or number >= CONTEXTS:
            oldest = left[0] if left else self.contexts[0]
            self.contexts.remove(oldest)
            number = oldest.number
        context = Context(number, generation, [tensor.clone() for tensor in conditioning], time, sample, self.calls)
        context.why = why
        self.contexts.append(context)
        return context

    def _changed(self, generation: Generation, time: list[float], conditioning: list[Tensor]) -> str:
        """Why a context begins at a later step than others of its generation; empty if it does not."""
        others = [c for c in self.contexts if c.generation is generation and _mean(c.timestep) > _mean(time)]
        if not others or self.timestep is None:
            return ""
        names = [name for i, name in enumerate(self.names) if self._is_conditioning(i)]
        pairs = zip(names, others[-1].conditioning, conditioning, strict=False)
        changed = [name for name, before, now in pairs if not torch.equal(before, now)]
        return f"other inputs than the sample and the timestep change from step to step ({', '.join(changed[:3])})"

    def _left(self, context: Context, time: list[float]) -> bool:
        """Whether a context does not look as if it was used once more."""
        once = context.steps == 1 and context.timestep != time and not context.generation.sure
        return once or self.calls - context.call > MAX_GAP


def _timesteps(time: list[float], timesteps: Sequence[float], *, rises: bool = False) -> list[float]:
    """The timesteps of a generation with a step at `time`, in the model's unit, the last first; empty if not known.

    Args:
        rises: the model's count upwards.
    """
    if not time or any(each != time[0] for each in time):
        return []
    found: list[float] = []
    farthest = -1
    for unit in UNITS:  # 1 may be the first timestep of 1 … 0 or the last of 1000 … 1: take it as the first
        known = sorted({(FIRST - each if rises else each) * unit for each in timesteps}, reverse=rises)
        place = next((i for i, each in enumerate(known) if _same(each, time[0])), -1)
        if place > farthest:
            found, farthest = known, place
    return found


def _signs(context: Context | None, conditioning: Sequence[Tensor], sample: Tensor) -> Tensor:
    """Whether a call has a context's conditioning, and whether its sample correlates with the last one: float64 [2]."""
    if context is None:
        return torch.zeros(2, dtype=torch.float64, device=sample.device)
    pairs = list(zip(context.conditioning, conditioning, strict=True))
    near = [(a == b).all() for a, b in pairs if b.device == sample.device]
    apart = all(torch.equal(a, b) for a, b in pairs if b.device != sample.device)  # numbers, which callers keep at hand
    equal = torch.stack(near).all() if near else torch.ones((), dtype=torch.bool, device=sample.device)
    now, then = _centered(sample), _centered(context.sample)
    correlates = (now * then).sum() > MIN_CORRELATION * now.norm() * then.norm()
    return torch.stack([equal & apart, correlates]).double()


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _mean(time: list[float]) -> float:
    return sum(time) / len(time) if time else 0.0


def _centered(sample: Tensor) -> Tensor:
    """A sample [B, C, *space] or [B, tokens, C] without the mean over space or tokens."""
    x = sample.float()
    dims = list(range(2, x.ndim)) if x.ndim > 3 else [1] if x.ndim == 3 else list(range(x.ndim))
    return x - x.mean(dims, keepdim=True)
