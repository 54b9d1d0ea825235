"""Ratios are taken per round, so that noise that slows a whole round cancels."""

import pytest

from benchmarks.harness import paired


def test_noise_that_affects_both_equally_cancels() -> None:
    base = [1.0, 1.7, 1.2, 2.5, 0.9]
    assert paired([1.25 * seconds for seconds in base], base) == pytest.approx((1.25, 1.25, 1.25))


def test_the_interval_holds_the_median_and_grows_with_the_spread() -> None:
    ones = [1.0] * 9
    _, low, high = paired([0.98, 0.99, 1.0, 1.01, 1.02, 0.99, 1.01, 1.0, 1.0], ones)
    _, lower, higher = paired([0.8, 0.9, 1.0, 1.1, 1.2, 0.9, 1.1, 1.0, 1.0], ones)
    assert lower < low <= 1.0 <= high < higher
