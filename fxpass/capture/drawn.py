"""Calls that draw random numbers from a generator among their arguments.

Such a call becomes a call with the numbers as one more argument, which is captured like any other. Each call draws its
numbers beforehand, with the functions that the model calls, in the same order, so that its generators are left in the
same state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .call import Call, Method
from .capture import capture_call
from .draws import GeneratorStandIn, generator_stand_in
from .errors import CaptureError, OtherDrawsError, model_line

ARGUMENT = "fxpass_drawn"  #: the name of the argument that holds the numbers: models have none of that name


@dataclass(frozen=True)
class Draw:
    """A call of a function that draws numbers: `torch.randn((2, 3), generator=…)`."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator: int  #: the number of the generator among the arguments

    def run(self, generators: Sequence[torch.Generator]) -> Tensor:
        return self.function(*self.args, **self.kwargs, generator=generators[self.generator])


@dataclass(frozen=True)
class DrawingCall:
    """A call whose numbers have been drawn: what the model is called with instead."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: Method
    _generators: tuple[torch.Generator, ...]
    _states: tuple[Tensor, ...]

    def give_back(self) -> None:
        """Give the numbers back to the generators: the call does not take place in this form."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


class Draws:
    """What calls of a model draw, by the kind of call and the numbers among its arguments."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[Any, tuple[Draw, ...]]] = {}

    def drawn(
        self, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None
    ) -> DrawingCall | None:
        """The call with its numbers drawn, if it is known that calls of its kind draw some; else None.

        If other numbers among its arguments make it draw something else, its capture raises `OtherDrawsError`.
        """
        held = _Held.of(model, args, kwargs, method) if self._known else None
        if held is None or held.key not in self._known:
            return None
        known = self._known[held.key]
        draws = known.get(held.numbers, next(reversed(known.values())))
        return held.drawing(draws) if draws else None

    def observed(
        self, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None
    ) -> DrawingCall | None:
        """As `drawn`, after running the model once to see what such a call draws.

        Returns None if it draws from no generator among its arguments.
        """
        held = _Held.of(model, args, kwargs, method)
        if held is None:
            return None
        draws = held.observe()
        if draws or held.key in self._known:
            self._known.setdefault(held.key, {})[held.numbers] = draws
        return held.drawing(draws) if draws else None


@dataclass(frozen=True)
class _Held:
    """A call with generators among its arguments, and stand-ins in their places."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: Method
    generators: tuple[torch.Generator, ...]

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None) -> _Held | None:
        if ARGUMENT in kwargs:
            return None  # the numbers have been drawn
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        generators = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, torch.Generator)))
        if not generators:
            return None
        numbers = {generator: i for i, generator in enumerate(generators)}
        leaves = [
            generator_stand_in(str(leaf.device), numbers[leaf]) if isinstance(leaf, torch.Generator) else leaf
            for leaf in leaves
        ]
        held, named = pytree.tree_unflatten(leaves, spec)
        return _Held(model, held, named, method or Method("forward", _forward(model)), generators)

    @cached_property
    def call(self) -> Call:
        return Call.of(self.model, self.args, self.kwargs, self.method)

    @property
    def key(self) -> Any:
        return self.call.key

    @property
    def numbers(self) -> Any:
        return tuple(self.call.numbers.values())

    def observe(self) -> tuple[Draw, ...]:
        """What the call draws. The model is run once; it and the generators are left as they were."""

        def function(*args: Any, **kwargs: Any) -> Any:
            with _Recording(self.generators) as recording:
                self.method.function(*args, **kwargs)
            raise _Observed(tuple(recording.draws))

        states = [generator.get_state() for generator in self.generators]
        observing = replace(self.method, function=_like(self.method.function, function))
        try:
            capture_call(self.model, Call.of(self.model, self.args, self.kwargs, observing))
        except _Observed as observed:
            return observed.draws
        finally:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
        raise AssertionError("a capture runs the model")

    def drawing(self, draws: tuple[Draw, ...]) -> DrawingCall:
        """Draw the numbers."""

        def function(*args: Any, **kwargs: Any) -> Any:
            with _Replacing(draws, kwargs.pop(ARGUMENT)) as replacing:
                result = self.method.function(*args, **kwargs)
            replacing.check_end()
            return result

        states = tuple(generator.get_state() for generator in self.generators)
        numbers = [draw.run(self.generators) for draw in draws]
        extended = replace(self.method, function=_like(self.method.function, function, ARGUMENT))
        return DrawingCall(self.args, {**self.kwargs, ARGUMENT: numbers}, extended, self.generators, states)


class _Observed(Exception):  # noqa: N818
    """Ends the run that is observed."""

    def __init__(self, draws: tuple[Draw, ...]) -> None:
        super().__init__()
        self.draws = draws


class _Mode(TorchFunctionMode):
    """Takes over the functions that draw from a stand-in."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        stand_in = kwargs.get("generator")
        if not isinstance(stand_in, GeneratorStandIn):
            return function(*args, **kwargs)
        del kwargs["generator"]
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):  # also `out`
            raise CaptureError(
                f"{getattr(function, '__name__', function)} at {model_line()} draws random numbers that depend on a "
                "tensor, or writes them to one; draw them by torch.randn or torch.rand"
            )
        return self.drawn(Draw(function, tuple(args), kwargs, stand_in.number))

    def drawn(self, draw: Draw) -> Tensor:
        raise NotImplementedError


class _Recording(_Mode):
    """Draws, and notes it down."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self._generators = generators
        self.draws: list[Draw] = []

    def drawn(self, draw: Draw) -> Tensor:
        self.draws.append(draw)
        return draw.run(self._generators)


class _Replacing(_Mode):
    """Gives numbers that have been drawn before."""

    def __init__(self, draws: Sequence[Draw], numbers: Sequence[Tensor]) -> None:
        super().__init__()
        self._waiting = list(zip(draws, numbers, strict=True))

    def drawn(self, draw: Draw) -> Tensor:
        if not self._waiting or self._waiting[0][0] != draw:
            raise self._other(f"at {model_line()}")
        return self._waiting.pop(0)[1]

    def check_end(self) -> None:
        """Raises `CaptureError` if numbers are left."""
        if self._waiting:
            raise self._other("at the end")

    def _other(self, where: str) -> OtherDrawsError:
        return OtherDrawsError(
            f"the model draws other random numbers than in an earlier call of the same kind ({where}); pass them in as "
            "an input"
        )


def _forward(model: nn.Module) -> Callable[..., Any]:
    """Calls the model, with its hooks; the signature is that of its forward."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return _like(model.forward, forward)


def _like(function: Callable[..., Any], other: Callable[..., Any], more: str = "") -> Callable[..., Any]:
    """`other` with the signature of `function`, and one more argument."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if more:
        last = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        parameters.insert(len(parameters) - bool(last), inspect.Parameter(more, inspect.Parameter.KEYWORD_ONLY))
    other.__signature__ = signature.replace(parameters=parameters)
    return other
