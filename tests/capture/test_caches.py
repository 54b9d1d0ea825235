"""Capturing leaves caches and classes as they were."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import CaptureError, capture

from .test_left_behind import alive, fakes


@pytest.fixture(params=["collected", "frozen"])
def freeze(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Hides classes and caches from the collector, as servers do by `gc.freeze`; or does nothing."""
    yield gc.freeze if request.param == "frozen" else lambda: None
    gc.unfreeze()


class Table(nn.Module):
    """Keeps its rows in a cache on the class, as several position embeddings do."""

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def rows(self, size: int) -> Tensor:
        return torch.arange(8.0) * size

    @functools.cache  # noqa: B019
    def doubled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3


class Cached(nn.Module):
    """`size` can be no tensor while operators are recorded: a capture tries that first, and fails."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def forward(self, x: Tensor, size: int) -> Tensor:
        return x * self.table.rows(size)[: int(size)].sum()


@functools.lru_cache(maxsize=8)
def scaled(x: Tensor) -> Tensor:
    return x * 2


class Slots:
    __slots__ = ("name", "value")


class OfClass(nn.Module):
    latest: Tensor | None = None
    kept = Slots()
    count = 0

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        self.keep(h)
        return h + 1


class Other:
    latest: Tensor | None = None


def test_a_model_with_a_cached_method_is_captured_and_its_class_keeps_the_method(freeze: Callable[[], None]) -> None:
    earlier, before = fakes(), dict(vars(Table))
    freeze()
    model, x = Cached().eval(), torch.randn(2, 8)
    split = fxpass.parallelize(model, 2, executor="lockstep")
    found = split(x, 3), split(x, 4)
    del split
    assert dict(vars(Table)) == before
    assert alive(*earlier) == []
    torch.testing.assert_close(found, (model(x, 3), model(x, 4)))


def test_caches_of_functions_of_values_are_emptied_of_values_of_the_recording(freeze: Callable[[], None]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.table.doubled(x)
            return scaled(x) + one * other

    earlier = fakes()
    freeze()
    model, x = Model().eval(), torch.randn(2, 8)
    split = fxpass.parallelize(model, 2, executor="lockstep")
    found = split(x), split(x + 1)
    del split
    assert alive(*earlier) == []
    torch.testing.assert_close(found, (model(x), model(x + 1)))


def test_a_failed_capture_clears_the_cache_of_a_function_and_keeps_the_function(freeze: Callable[[], None]) -> None:
    def keep(h: Tensor) -> None:
        scaled(h)
        if torch.compiler.is_compiling():
            raise ValueError("no")

    earlier, function = fakes(), scaled
    freeze()
    with pytest.raises(CaptureError, match="ValueError"):
        capture(OfClass(keep).eval(), torch.randn(2, 8))
    assert globals()["scaled"] is function
    assert alive(*earlier) == []


def keep_in_class(h: Tensor) -> None:
    OfClass.latest = h


def keep_in_slot(h: Tensor) -> None:
    OfClass.kept.value = h


def keep_in_other_class(h: Tensor) -> None:
    Other.latest = h


@pytest.mark.parametrize(
    ("keep", "where"),
    [(keep_in_class, "OfClass.latest"), (keep_in_slot, "a Slots"), (keep_in_other_class, "latest")],
)
def test_a_value_kept_in_a_class_is_refused_and_the_class_loses_no_attribute(
    keep: Any, where: str, freeze: Callable[[], None]
) -> None:
    earlier, before, other = fakes(), dict(vars(OfClass)), set(vars(Other))
    freeze()
    with pytest.raises(CaptureError, match=where) as caught:
        capture(OfClass(keep).eval(), torch.randn(2, 8))
    del caught
    assert dict(vars(OfClass)) == before
    assert set(vars(Other)) == other
    assert alive(*earlier) == []


def test_an_attribute_of_a_class_that_the_recorded_run_sets_is_restored() -> None:
    class Model(nn.Module):
        mode = ""

        def forward(self, x: Tensor) -> Tensor:
            type(self).mode = "recorded" if torch.compiler.is_compiling() else "eager"
            return x + 1

    capture(Model().eval(), torch.randn(2, 8))
    assert Model.mode == "eager"


def test_a_number_of_a_class_that_each_call_changes_is_refused_by_name() -> None:
    def count(h: Tensor) -> None:
        OfClass.count += 1

    before = OfClass.count
    with pytest.raises(CaptureError, match=r"OfClass\.count \(. before"):
        capture(OfClass(count).eval(), torch.randn(2, 8))
    assert OfClass.count == before


def test_a_tensor_of_a_class_is_a_constant_until_it_is_replaced() -> None:
    class Model(nn.Module):
        table = torch.arange(8.0)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    program = capture(Model().eval(), torch.ones(2, 8))
    assert not program.reads.changed()
    Model.table = torch.ones(8)
    assert program.reads.changed()
