"""Predictions against measurements: within 20 % of what whole models and ranks' programs took on real GPUs."""

from __future__ import annotations

import pytest

from benchmarks.predicted import A100, H100, Row, fitted, generation, without_exchanges
from fxpass.passes.targets import Device, find

GRAPHS = [row for row in H100 if row.graphs]
QUICK = [row for row in GRAPHS if (row.model, row.size) == ("sdxl", 1024)]


def check(row: Row) -> None:
    assert without_exchanges(row, find("H100").device) == pytest.approx(row.seconds, rel=0.2)


@pytest.mark.parametrize("row", QUICK, ids=str)
def test_steps_of_a_small_picture_take_as_long_as_on_one_h100(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in GRAPHS if row not in QUICK], ids=str)
def test_steps_take_as_long_as_on_one_h100(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("size", A100)
def test_generations_by_distrifusions_rules_take_as_long_as_it_published(size: int) -> None:
    target = find("A100-SXM")
    found = [generation(size, gpus, target) for gpus in (1, 2, 4, 8)]
    assert found == pytest.approx(A100[size], rel=0.2)


def test_a_fit_finds_the_figures_that_the_measurements_come_from() -> None:
    true = find("H100").device

    def step(kind: str, device: Device) -> float:
        return 1e-3 / device.reached[kind] + 100 * device.kernel  # type: ignore[index]

    kinds = ("product", "convolution", "attention")
    start = find("A100-SXM").device
    found = fitted(start, [(step(kind, true), lambda device, kind=kind: step(kind, device)) for kind in kinds])
    for kind in kinds:
        assert step(kind, found) == pytest.approx(step(kind, true), rel=0.03)
