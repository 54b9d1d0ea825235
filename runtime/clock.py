"""When is an exact step needed? Timesteps alone cannot tell, so a displaced step needs every sign of a continuation.

Calls with equal conditioning (all inputs but sample and timestep) belong to one *context*: one guidance branch of one
prompt. A call continues its context if

- no timestep has risen (a new generation starts high again), come three times (Heun and PNDM repeat them once, though
  not the first) or fallen by several times as much as at the step before (a generation that begins in the middle),
- the sample correlates with the last one (fresh noise does not, even at a lower timestep), and
- the context was used not long ago.

Otherwise a generation begins, whose first `warmup_steps` calls are exact. All ranks are given the same inputs, so they
decide alike. What cannot be told: two generations of one prompt and one seed that take turns in one module, or of which
the second begins next to where the first was left.

Its last `cooldown_steps` timesteps are exact as well, where it is known which those are: `restart` was told what
timesteps there will be, and the model's is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir.inputs import moving
from ..ir.program import Program
from .executor import EXACT, Step

CONTEXTS = 4  #: kept at once; guidance has two or three branches
RECENT = 8  #: calls after which a context is taken to have been left
LIKE = 0.5  #: correlation of a sample with the one before; independent noise has 0, most samplers' steps above 0.9
UNITS = (1.0, 1e-3)  #: what pipelines multiply the scheduler's timesteps by before they give them to the model
SAME = 0.01  #: two timesteps are one if they differ by less, relatively: a half-precision one has 8 bits
LEAP = 3.0  #: a timestep that falls by more, in units of its last fall, begins a generation; samplers' stay below 2.5
FASTEST = 2.0  #: a longer step is forecast as if it were so many times as long as the last


@dataclass
class Context:
    """A guidance branch in the middle of a generation."""

    number: int
    conditioning: list[Tensor]
    timestep: list[float]
    sample: Tensor
    call: int  #: when it was last used
    steps: int = 1  #: calls of this generation so far
    repeated: bool = False  #: its last timestep was the one before
    stride: float = 0.0  #: by how much the timestep fell at its last call; 0 at the first
    fall: float = 0.0  #: the last stride that is not 0
    final: list[float] = field(default_factory=list)  #: the timesteps at its end that are exact


@dataclass
class Clock:
    """Decides for the calls of one captured program.

    Args:
        timestep: which input is the timestep; None if no input is known to be one: then every step is exact.
        sample: which input is the sample.
        warmup_steps: exact steps at the beginning of a generation, at least one.
        cooldown_steps: exact steps at its end.
        timesteps: those of the generation, as its scheduler has them; empty if they are not known.
    """

    timestep: int | None
    sample: int
    warmup_steps: int
    cooldown_steps: int = 0
    timesteps: Sequence[float] = ()
    contexts: list[Context] = field(default_factory=list)
    calls: int = 0

    @staticmethod
    def of(program: Program, warmup_steps: int, cooldown_steps: int = 0, timesteps: Sequence[float] = ()) -> Clock:
        """A clock for the inputs of a program."""
        found = moving(program)
        if found is None:
            return Clock(None, 0, warmup_steps)
        return Clock(found.timestep, found.sample, max(1, warmup_steps), cooldown_steps, timesteps)

    def step(self, tensors: Sequence[Tensor]) -> Step:
        """How to run a call with these inputs."""
        self.calls += 1
        if self.timestep is None:
            return EXACT
        time = tensors[self.timestep].detach().double().flatten().tolist()
        sample = tensors[self.sample].detach()
        moving = (self.timestep, self.sample)
        conditioning = [tensor for i, tensor in enumerate(tensors) if i not in moving]
        for context in self.contexts:
            if all(torch.equal(a, b) for a, b in zip(context.conditioning, conditioning, strict=True)):
                continued = self._continues(context, time, sample)
                context.steps = context.steps + 1 if continued else 1
                context.repeated = continued and time == context.timestep
                last, context.stride = context.stride, _mean(context.timestep) - _mean(time) if continued else 0.0
                context.fall = context.stride or (context.fall if continued else 0.0)
                pace = min(context.stride / last, FASTEST) if last else 0.0
                break
        else:
            context, pace = self._new(time, conditioning, sample), 0.0
        self.contexts.remove(context)
        self.contexts.append(context)  # the latest last
        context.timestep, context.sample, context.call = time, sample.clone(), self.calls
        if context.steps == 1:
            context.final = self._final(time)
        final = any(_same(_mean(time), each) for each in context.final)
        return Step(context.number, context.steps <= self.warmup_steps or final, pace)

    def restart(self, timesteps: Sequence[float] = ()) -> None:
        """A generation begins, with these timesteps if any are known: no earlier state is read."""
        self.timesteps = timesteps
        for context in self.contexts:
            context.call = -RECENT

    def _final(self, time: list[float]) -> list[float]:
        """The last timesteps, in the model's unit, of a generation that begins at `time`; empty if not known."""
        if not time or not self.cooldown_steps or any(each != time[0] for each in time):
            return []
        found: list[float] = []
        farthest = -1
        for unit in UNITS:  # 1 may be the first of thousandths or the last of a thousand: then it is the first
            left = sorted({each * unit for each in self.timesteps})
            place = next((i for i, each in enumerate(left) if _same(each, time[0])), -1)
            if place > farthest:
                found, farthest = left[: self.cooldown_steps], place
        return found

    def _continues(self, context: Context, time: list[float], sample: Tensor) -> bool:
        falling = all(now <= then for now, then in zip(time, context.timestep, strict=True))
        again = time == context.timestep and (context.repeated or context.steps == 1)
        leap = context.fall and _mean(context.timestep) - _mean(time) > LEAP * context.fall
        if not falling or again or leap or self.calls - context.call > RECENT:
            return False
        now, then = _structure(sample), _structure(context.sample)
        return bool((now * then).sum() > LIKE * now.norm() * then.norm())

    def _new(self, time: list[float], conditioning: list[Tensor], sample: Tensor) -> Context:
        """A context of another conditioning, in the place of one that was left."""
        left = [c for c in self.contexts if self.calls - c.call > RECENT or (c.steps == 1 and c.timestep != time)]
        number = len(self.contexts)
        if left or number >= CONTEXTS:
            oldest = left[0] if left else self.contexts[0]
            self.contexts.remove(oldest)
            number = oldest.number
        context = Context(number, [tensor.clone() for tensor in conditioning], time, sample, self.calls)
        self.contexts.append(context)
        return context


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * max(abs(a), abs(b))


def _mean(time: list[float]) -> float:
    return sum(time) / len(time) if time else 0.0


def _structure(sample: Tensor) -> Tensor:
    """A sample [B, C, *space] or [B, tokens, C] without the mean over space or tokens."""
    x = sample.float()
    dims = list(range(2, x.ndim)) if x.ndim > 3 else [1] if x.ndim == 3 else list(range(x.ndim))
    return x - x.mean(dims, keepdim=True)
