"""Property tests that do the same on every machine. Tests import `given` from here, not from hypothesis.

One profile serves `make test` and CI; `make fuzz` (`tests/fuzz.py`) selects the other one, which draws new examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

FUZZ_EXAMPLES = 10  #: how many examples a property draws in one turn of `make fuzz`

_COMMON: dict[str, Any] = {"deadline": None, "database": None, "print_blob": True}
settings.register_profile(
    "fixed",
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    **_COMMON,
)
settings.register_profile(
    "fuzz", derandomize=False, max_examples=FUZZ_EXAMPLES, suppress_health_check=list(HealthCheck), **_COMMON
)

# Hypothesis mixes the constants of our loaded modules into the values it draws. Which modules are loaded depends on the
# tests that ran before in the same process, so examples would depend on it as well.
assert hasattr(providers.HypothesisProvider, "_local_constants")
providers.HypothesisProvider._local_constants = Constants()


class _TorchRandom:
    """Torch's global generator, as hypothesis seeds and restores generators."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_TORCH_RANDOM)

begun = 0  #: number of examples begun in this process


@st.composite
def _seeded(draw: st.DrawFn, strategy: st.SearchStrategy[Any]) -> Any:
    """A value of `strategy`, after seeding the random numbers of torch, NumPy and Python from a drawn number."""
    global begun
    begun += 1
    draw(st.random_module())
    return draw(strategy)


def given(*positional: Any, **named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`hypothesis.given`, where all random numbers of an example follow from what hypothesis draws.

    The seed is drawn before anything else, so that strategies may call `torch.randn` as well.
    """
    if positional:
        positional = (_seeded(positional[0]), *positional[1:])
    else:
        first = next(iter(named))
        named[first] = _seeded(named[first])
    return hypothesis.given(*positional, **named)  # noqa: TID251  this is the one place


def examples(count: int) -> settings:
    """Draw so many examples in `make test`; in `make fuzz` as many as any property draws in one turn."""
    return settings() if settings.get_current_profile_name() == "fuzz" else settings(max_examples=count)


def few(test: Callable[..., None]) -> Callable[..., None]:
    return examples(8)(test)


def some(test: Callable[..., None]) -> Callable[..., None]:
    return examples(25)(test)
