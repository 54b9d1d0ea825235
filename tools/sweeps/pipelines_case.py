"""Measure one pipeline class: build it small, run it unsplit and split over two ranks, and compare the results.

Where the results differ by more than rounding, some sampler may amplify it, or a picture is rounded to whole numbers.
Then each call of a denoiser and each `decode` is made again on equal inputs, and the unsplit pipeline is run with noise
of the size of their differences: a pipeline whose parts are exact, and whose result changes as much by such noise,
amplifies.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
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
    noise: float | None = None  #: change of the unsplit result by such noise
    split: tuple[str, ...] = ()  #: parts that exchanged something
    whole: tuple[str, ...] = ()  #: parts that ran unsplit, with the reason
    blind: str = ""  #: why equality says little
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One of: left out, none, refused, failed, equal, amplifies, wrong."""
        for word in ("left_out", "none", "refused", "failed"):
            if getattr(self, word):
                return word.replace("_", " ")
        if self.error <= PICTURE:
            return "equal"
        exact = self.calls is not None and self.calls <= CALL
        return "amplifies" if exact and self.error <= LIKE_NOISE * (self.noise or 0.0) else "wrong"

    @staticmethod
    def of(data: dict[str, Any]) -> Found:
        """From plain data, as `measure` returns and JSON keeps them."""
        known = {each.name for each in fields(Found)}
        lists = {name: tuple(data.get(name, ())) for name in ("split", "whole")}
        return Found(**{name: value for name, value in data.items() if name in known} | lists)


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
        exactness = of_calls(name)
        yield {"calls": exactness, "noise": of_noise(name, expected, exactness)}


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative where values are larger than 1; infinity for other shapes."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in pairs), default=0.0)


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
    return tuple(name for name, module in parts(pipeline).items() if fxpass.parallel(module).traffic)


def of_calls(name: str) -> float:
    """The largest relative difference of any call of a part, on equal inputs."""
    small = build(name)
    calls: list[tuple[nn.Module, str, Any, Any, list[Tensor]]] = []

    def note(module: nn.Module, method: str, args: Any, kwargs: Any, output: Any) -> None:
        wanted = [each.clone() for each in tensors(_plain(output))]
        calls.append((module, method, _copied(args), _copied(kwargs), wanted))

    with _overheard(small, note):
        small.run()
    fxpass.parallelize(small.pipeline, RANKS, executor="lockstep")
    worst = 0.0
    for module, method, args, kwargs, expected in calls:
        with torch.no_grad():
            found = list(tensors(_plain(getattr(module, method)(*args, **kwargs))))
        pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
        worst = max([worst, *(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)])
    return worst


def of_noise(name: str, expected: list[Tensor], size: float) -> float:
    """How much the unsplit result changes if each output of a part gets noise of at most that relative size."""
    small, generator = build(name), torch.Generator().manual_seed(1)

    def disturb(module: nn.Module, method: str, args: Any, kwargs: Any, output: Any) -> None:
        for each in tensors(_plain(output)):
            if each.is_floating_point():
                noise = 2 * torch.rand(each.shape, generator=generator) - 1
                each.add_((noise * size * float(each.abs().max())).to(each))

    with _overheard(small, disturb):
        return difference(small.run(), expected)


@contextmanager
def _overheard(small: Small, hear: Any) -> Iterator[None]:
    """Call `hear(module, method, args, kwargs, output)` after each call of a denoiser, and each `decode`."""
    undo: list[Any] = []
    for module in parts(small.pipeline).values():
        method = "decode" if methods_of(module) else "forward"
        plain = getattr(module, method)

        def heard(*args: Any, _plain: Any = plain, _key: Any = (module, method), **kwargs: Any) -> Any:
            output = _plain(*args, **kwargs)
            hear(*_key, args, kwargs, output)
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


def _plain(output: Any) -> Any:
    return dict(output) if hasattr(output, "to_tuple") else output


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


def _sentence(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"
