"""Measure one pipeline class: build it small, run it unsplit and split over two ranks, and compare the results.

Where the results differ by more than rounding, some sampler may amplify it, or a picture is rounded to whole numbers.
Then each call of a denoiser, each `encode` and each `decode` is made again on equal inputs, and the unsplit pipeline is
run with noise of the size of their differences: a pipeline whose parts are exact, and whose result changes as much by
such noise, amplifies. Where the pipeline also runs in float64, its results in float64 decide, since parts may amplify.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

import fxpass

from ...models.pipelines import autoencoders, beside, denoisers, methods_of, pipelines_in
from ...models.pipelines_zoo import Small, build
from ...models.pipelines_zoo.build import tensors

RANKS = 2
PICTURE = 1e-4  #: largest difference that counts as equal, of results whose values lie within 1, relative above
CALL = 1e-5  #: largest relative difference of a part's output on equal inputs
DOUBLE = 1e-6  #: largest difference of results that are computed in float64 (pictures are float32 in the end)
LIKE_NOISE = 10.0  #: an amplified difference is at most so many times what equal noise does
MOVED = 1e-3  #: least standard deviation of some result


@dataclass(frozen=True)
class Found:
    """The result of a pipeline class."""

    name: str
    key: str
    left_out: str = ""  #: why it is not built: the missing package or download
    none: str = ""  #: why there is nothing to split
    refused: str = ""  #: the error of the split call, where the unsplit one worked
    failed: str = ""  #: what stopped the measurement
    error: float = float("nan")  #: largest difference of a result
    calls: float | None = None  #: largest relative difference of a part's call on equal inputs, if compared
    double: float | None = None  #: largest difference of a result in float64, if compared
    noise: float | None = None  #: change of the unsplit result by such noise
    split: tuple[str, ...] = ()  #: parts that exchanged something
    whole: tuple[str, ...] = ()  #: parts that ran unsplit, with the reason
    blind: str = ""  #: why equality says little
    seconds: float = 0.0
    commit: str = ""  #: of the code that was measured

    @property
    def verdict(self) -> str:
        """One of: left out, none, refused, failed, equal, amplifies, wrong."""
        for word in ("left_out", "none", "refused", "failed"):
            if getattr(self, word):
                return word.replace("_", " ")
        if self.error <= PICTURE:
            return "equal"
        found, most = (self.calls, CALL) if self.double is None else (self.double, DOUBLE)
        exact = found is not None and found <= most
        return "amplifies" if exact and self.error <= LIKE_NOISE * (self.noise or 0.0) else "wrong"

    @staticmethod
    def of(data: dict[str, Any]) -> Found:
        """From plain data, as `measure` returns and JSON keeps them."""
        known = {each.name for each in fields(Found)}
        lists = {name: tuple(data.get(name, ())) for name in ("split", "whole")}
        given: dict[str, Any] = {name: value for name, value in data.items() if name in known} | lists
        return Found(**given)


def measure(name: str, key: str) -> dict[str, Any]:
    """Measure one class. An error that stops the measurement becomes part of the result."""
    started = time.perf_counter()
    facts: dict[str, Any] = {"failed": ""}
    try:
        for some in _facts(name):
            facts |= some
    except ImportError as error:
        facts["left_out"] = str(error)
    except Exception as error:
        traceback.print_exc()
        facts["failed"] = _sentence(error)
    return asdict(Found(name, key, **facts, seconds=time.perf_counter() - started))


def _facts(name: str) -> Iterator[dict[str, Any]]:
    small = build(name)
    expected = small.run()
    if not all(bool(each.isfinite().all()) for each in expected):
        raise ArithmeticError("the unsplit result is not finite")
    yield {"blind": _blind(expected)}
    try:
        fxpass.parallelize(small.pipeline, RANKS, executor="lockstep")
    except TypeError as error:
        yield {"none": _sentence(error)}
        return
    try:
        with _heard() as said:
            found = small.run()
    except (RuntimeError, TypeError, ValueError) as error:
        yield {"refused": _sentence(error)}
        return
    error = difference(found, expected)
    yield {"error": error, "split": split_parts(small.pipeline), "whole": tuple(said)}
    if not error <= PICTURE:
        calls = of_calls(name)
        yield {"calls": calls, "double": in_double(name), "noise": of_noise(name, expected, calls)}


def difference(found: list[Tensor], expected: list[Tensor], least: float = 1.0) -> float:
    """The largest difference, relative where values are larger than `least`; infinity for other shapes, or NaN."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.numel()]
    each = [(a - b).abs().max() / b.abs().max().clamp(min=least) for a, b in pairs]
    return float(torch.stack(each).max()) if each else 0.0  # unlike Python's, this `max` keeps NaN


def parts(pipeline: Any) -> dict[str, nn.Module]:
    """What `parallelize` splits of a pipeline, by name, each module once."""
    found: dict[str, nn.Module] = {}
    for each in pipelines_in(pipeline):
        for name in (*denoisers(each), *beside(each), *autoencoders(each)):
            module = getattr(each, name)
            if all(module is not other for other in found.values()):
                found[name] = module
    return found


def split_parts(pipeline: Any) -> tuple[str, ...]:
    """The parts whose ranks have exchanged something."""
    handles = {name: fxpass.parallel(module) for name, module in parts(pipeline).items()}
    plans = {id(handle.plan) for handle in handles.values() if handle.traffic}  # several parts may run by one plan
    return tuple(name for name, handle in handles.items() if id(handle.plan) in plans)


@dataclass(frozen=True)
class Call:
    """One call of a method of a part."""

    module: nn.Module
    method: str
    args: Any
    kwargs: Any

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        args, kwargs = _copied((self.args, self.kwargs))
        torch.manual_seed(0)
        return outputs(getattr(self.module, self.method)(*args, **kwargs))


def of_calls(name: str) -> float:
    """The largest relative difference of any call of a part, on equal inputs."""
    small = build(name)
    calls: list[Call] = []

    def note(call: Call, output: Any) -> None:
        calls.append(replace(call, args=_copied(call.args), kwargs=_copied(call.kwargs)))

    with overheard(small, note):
        small.run()
    expected = [call.run() for call in calls]
    fxpass.parallelize(small.pipeline, RANKS, executor="lockstep")
    each = [difference(call.run(), wanted, least=1e-12) for call, wanted in zip(calls, expected, strict=True)]
    return float(torch.tensor([0.0, *each], dtype=torch.float64).max())


def in_double(name: str) -> float | None:
    """The difference of the results if all is computed in float64; None if the unsplit pipeline does not run in it."""
    small = build(name)
    small.pipeline.to(torch.float64)
    try:
        expected = small.run()
    except (RuntimeError, TypeError, ValueError):
        return None
    fxpass.parallelize(small.pipeline, RANKS, executor="lockstep")
    return difference(small.run(), expected)


def of_noise(name: str, expected: list[Tensor], size: float) -> float:
    """How much the unsplit result changes if each output of a part gets noise of at most that relative size."""
    small, generator = build(name), torch.Generator().manual_seed(1)

    def disturb(call: Call, output: Any) -> None:
        for each in outputs(output):
            if each.is_floating_point():
                noise = 2 * torch.rand(each.shape, generator=generator) - 1
                each.add_((noise * size * float(each.abs().max())).to(each))

    with overheard(small, disturb):
        return difference(small.run(), expected)


@contextmanager
def overheard(small: Small, hear: Callable[[Call, Any], None]) -> Iterator[None]:
    """Call `hear(call, output)` after each call of a denoiser, each `encode` and each `decode`."""
    undo: list[Any] = []
    for module in parts(small.pipeline).values():
        for method in methods_of(module) or ["forward"]:
            plain = getattr(module, method)

            def heard(*args: Any, _plain: Any = plain, _key: tuple[Any, str] = (module, method), **kwargs: Any) -> Any:
                output = _plain(*args, **kwargs)
                hear(Call(*_key, args, kwargs), output)
                return output

            setattr(module, method, heard)
            undo.append((module, method))
    try:
        yield
    finally:
        for module, method in undo:
            delattr(module, method)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings that say that something runs unsplit."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    found = (str(each.message) for each in caught if issubclass(each.category, fxpass.FxpassWarning))
    said += dict.fromkeys(each for each in found if "unsplit" in each)


def _blind(expected: list[Tensor]) -> str:
    """Why equality of the results says little; nothing if it says something."""
    moving = any(float(each.double().std()) > MOVED for each in expected if each.numel() > 1)
    return "" if moving else "the unsplit result is nearly constant"


def outputs(output: Any) -> list[Tensor]:
    """All tensors of a part's output; of a distribution, as an encoder returns it, its parameters."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    values = output if isinstance(output, list | tuple) else (output,)
    return [tensor for value in values for tensor in tensors(getattr(value, "parameters", value))]


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


def _sentence(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"
