"""What may be stale, and by how much: presets by the names of their papers (DistriFusion, PCPP)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import get_args

from .ir.exchange import Freshness


@dataclass(frozen=True)
class Strategy:
    """How fresh each kind of exchange is.

    `sync`: exact; `stale`: the own part, and the others' of the last step; `frozen`: the own part, and the others' of
    the last exact step. Moments may also be `corrected` (those of the last step, plus the full change of the own ones)
    or `local` (the own ones only).

    Attributes:
        halo: border rows of convolutions.
        keys_values: keys and values of self-attention.
        moments: mean and variance of group norms.
        sums: other reductions over the split dim.
        window: tokens of each neighbour that attention sees, as a fraction of the neighbour's; None: all of all.
        warmup_steps: exact steps before the first stale one; there is always one.

    Raises:
        ValueError: a field has no such value.
    """

    name: str = "sync"
    halo: Freshness = "sync"
    keys_values: Freshness = "sync"
    moments: Freshness = "sync"
    sums: Freshness = "sync"
    window: float | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for kind in ("halo", "keys_values", "moments", "sums"):
            # the others' rows cannot be left out of a convolution, an attention or a sum; of a mean they can
            known = get_args(Freshness) if kind == "moments" else ("sync", "stale", "frozen")
            if getattr(self, kind) not in known:
                raise ValueError(f"Strategy.{kind} is one of {', '.join(known)}, not {getattr(self, kind)!r}")
        if self.window is not None and not 0 <= self.window <= 1:
            raise ValueError(f"Strategy.window is a fraction of the neighbour's tokens, 0 to 1, not {self.window!r}")
        if self.warmup_steps < 0:
            raise ValueError(f"Strategy.warmup_steps is a number of steps, not {self.warmup_steps!r}")

    @property
    def exact(self) -> bool:
        """Whether the result equals the unsplit model's, to rounding."""
        kinds = (self.halo, self.keys_values, self.moments, self.sums)
        return all(kind == "sync" for kind in kinds) and self.window is None

    @staticmethod
    def of(strategy: Strategy | str) -> Strategy:
        """A preset by name, or the strategy itself.

        Raises:
            ValueError: no such preset; the message suggests the nearest.
            NotImplementedError: it is not built yet.
        """
        if isinstance(strategy, str):
            if strategy in PLANNED:
                raise NotImplementedError(f"strategy {strategy!r} is not built yet; use 'sync'")
            if strategy not in PRESETS:
                near = difflib.get_close_matches(strategy, [*PRESETS, *PLANNED], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PRESETS)}"
                raise ValueError(f"unknown strategy {strategy!r}; {hint}")
            strategy = PRESETS[strategy]
        if not isinstance(strategy, Strategy):
            raise ValueError(f"a strategy is a name ({', '.join(PRESETS)}) or a Strategy, not {strategy!r}")
        if strategy.window is not None:
            raise NotImplementedError(f"strategy {strategy.name!r} has attention windows, which are not built yet")
        return strategy

    def __str__(self) -> str:
        return self.name


def _stale(name: str, moments: Freshness, *, kept: Freshness = "stale", window: float | None = None) -> Strategy:
    return Strategy(name, kept, kept, moments, kept, window, warmup_steps=5)


PRESETS: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(),
        _stale("displaced", "corrected"),
        _stale("stale_gn", "stale"),
        _stale("sync_gn", "sync"),
        _stale("separate_gn", "local"),
        _stale("no_sync", "local", kept="frozen"),
        _stale("pcpp", "corrected", window=0.3),
    )
}
PRESETS |= {"full_sync": PRESETS["sync"], "corrected_async_gn": PRESETS["displaced"]}  # DistriFusion's names
PLANNED = ("ulysses", "ring", "auto")  #: other ways to be exact, and the choice between them
