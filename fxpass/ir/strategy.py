"""Which exchanges are stale at displaced steps, and how; presets as in DistriFusion, PCPP and AsyncDiff."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, get_args

from .coding import OUTERMOST
from .exchange import Freshness, Role


@dataclass(frozen=True)
class Strategy:
    """How fresh each kind of exchange is at displaced steps.

    A rank always uses its own part of this step. Of the other ranks it uses: `sync`, their parts of this step (exact);
    `stale`, those of the last step; `frozen`, those of the last exact step; `local`, none: halos repeat the nearest own
    row, attention sees the own tokens alone. Moments may also be `corrected` (those of the last step plus the whole
    change of the own part), or `predicted` (those of the last step, each moved by a share of the own change and of its
    own last change).

    Attributes:
        name: the preset's name.
        halo: border rows of convolutions.
        keys_values: keys and values of self-attention.
        moments: mean and variance of group norms.
        sums: other reductions over the split dim.
        transfers: what stages make of the sample and give to later stages: `sync`, or `stale`, so that all stages work
            at once, each on what the stages before it made at the last step.
        forecast: the largest share of a halo's last change that is extrapolated, 0 to 1. Each rank measures the share
            on its own values.
        bits: displaced steps send the changes of halos, keys and values since the last step in so many bits per number:
            2, 4 or 8; 0: they send the values.
        window: the tokens of each neighbour that attention sees at displaced steps, as a fraction of the neighbour's
            tokens, above 0 and at most 1, rounded up. Several fractions apply to equal parts of the depth, first to
            last. None: attention sees all tokens of all ranks.
        warmup_steps: exact steps before the first stale one, at least one.
        cooldown_steps: exact steps at the end of a generation, where no later step reduces an error. They need to know
            the timesteps of the generation, from a pipeline or from `ParallelModule.reset`.

    Raises:
        ValueError: a field has an invalid value.
    """

    name: str = "sync"
    halo: Freshness = "sync"
    keys_values: Freshness = "sync"
    moments: Freshness = "sync"
    sums: Freshness = "sync"
    transfers: Freshness = "sync"
    forecast: float = 0.0
    bits: int = 0
    window: float | tuple[float, ...] | None = None
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        for kind in ("halo", "keys_values", "moments", "sums"):
            known = get_args(Freshness) if kind == "moments" else ("sync", "stale", "frozen", "local")
            if getattr(self, kind) not in known:
                raise ValueError(f"Strategy.{kind} is one of {', '.join(known)}, not {getattr(self, kind)!r}")
        if self.transfers not in ("sync", "stale"):
            raise ValueError(f"Strategy.transfers is sync or stale, not {self.transfers!r}")
        if not (_number(self.forecast) and 0 <= self.forecast <= 1):
            raise ValueError(f"Strategy.forecast is a share of the last change, 0 to 1, not {self.forecast!r}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in (0, *OUTERMOST):
            known = ", ".join(map(str, OUTERMOST))
            raise ValueError(f"Strategy.bits is {known}, or 0 for no coding, not {self.bits!r}")
        if self.bits and "stale" not in (self.halo, self.keys_values):
            raise ValueError(
                "Strategy.bits is for stale halos, keys and values, and Strategy.halo and Strategy.keys_values are "
                f"{self.halo!r} and {self.keys_values!r}"
            )
        for share in self.windows:
            if not (_number(share) and 0 < share <= 1):
                raise ValueError(
                    f"Strategy.window is a fraction of the neighbour's tokens, above 0 to 1, not {self.window!r}"
                )
        if self.windows and self.keys_values != "stale":
            raise ValueError(
                f"Strategy.window is for stale keys and values, and Strategy.keys_values is {self.keys_values!r}"
            )
        for name in ("warmup_steps", "cooldown_steps"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"Strategy.{name} is a number of steps, not {count!r}")

    @property
    def windows(self) -> tuple[float, ...]:
        """`window` as a tuple, for equal parts of the depth; empty if attention sees all tokens."""
        if self.window is None:
            return ()
        return self.window if isinstance(self.window, tuple) else (self.window,)

    def freshness(self, role: Role) -> Freshness:
        """How fresh exchanges of `role` are, if their rules allow them to be stale."""
        fields: dict[str, Freshness] = {
            "halo": self.halo, "keys_values": self.keys_values, "moments": self.moments, "sum": self.sums,
            "transfer": self.transfers,
        }  # fmt: skip
        return fields[role]

    @property
    def exact(self) -> bool:
        """Whether every step equals the unsplit model, up to rounding."""
        kinds = (self.halo, self.keys_values, self.moments, self.sums, self.transfers)
        return all(kind == "sync" for kind in kinds)

    @property
    def overlaps(self) -> bool:
        """Whether all stages work at once at displaced steps."""
        return self.transfers != "sync"

    @staticmethod
    def of(strategy: Strategy | str, *others: str) -> Strategy:
        """The preset of that name, or the strategy itself.

        Args:
            others: names that the caller takes besides; messages suggest them too.

        Raises:
            ValueError: no such preset; the message suggests the nearest.
        """
        if isinstance(strategy, str):
            if strategy not in PRESETS:
                known = [*PRESETS, *others]
                near = difflib.get_close_matches(strategy, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
                raise ValueError(f"unknown strategy {strategy!r}; {hint}")
            strategy = PRESETS[strategy]
        if not isinstance(strategy, Strategy):
            raise ValueError(f"a strategy is a name ({', '.join([*PRESETS, *others])}) or a Strategy, not {strategy!r}")
        return strategy

    def __str__(self) -> str:
        return self.name


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stale(name: str, moments: Freshness, *, others: Freshness = "stale", **more: Any) -> Strategy:
    options: dict[str, Any] = {"warmup_steps": 5} | more
    return Strategy(name, others, others, moments, others, **options)


PRESETS: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(),
        _stale("displaced", "predicted", forecast=1.0, warmup_steps=4, cooldown_steps=1),
        _stale("compressed", "predicted", forecast=1.0, bits=2, warmup_steps=4, cooldown_steps=1),
        _stale("corrected_async_gn", "corrected"),
        _stale("stale_gn", "stale"),
        _stale("sync_gn", "sync"),
        _stale("separate_gn", "local"),
        _stale("no_sync", "local", others="frozen"),
        _stale("pcpp", "corrected", window=0.3),
        Strategy("asyncdiff", transfers="stale", warmup_steps=2, cooldown_steps=3),
    )
}
PRESETS |= {"full_sync": PRESETS["sync"]}  # DistriFusion's name
