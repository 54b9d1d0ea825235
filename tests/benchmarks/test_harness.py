"""Ratios are taken per round, so that noise that slows a whole round cancels; ceilings send nothing."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.harness import StaticChannel, paired
from fxpass.ir.exchange import Payloads


def test_noise_that_affects_both_equally_cancels() -> None:
    base = [1.0, 1.7, 1.2, 2.5, 0.9]
    assert paired([1.25 * seconds for seconds in base], base) == pytest.approx((1.25, 1.25, 1.25))


def test_the_interval_holds_the_median_and_grows_with_the_spread() -> None:
    ones = [1.0] * 9
    _, low, high = paired([0.98, 0.99, 1.0, 1.01, 1.02, 0.99, 1.01, 1.0, 1.0], ones)
    _, lower, higher = paired([0.8, 0.9, 1.0, 1.1, 1.2, 0.9, 1.1, 1.0, 1.0], ones)
    assert lower < low <= 1.0 <= high < higher


class Counting:
    """A channel whose messages are their numbers."""

    lends = False
    number = 0
    closed = False

    def put(self, packed: Sequence[Payloads]) -> None:
        self.number += 1

    def ready(self) -> bool:
        return False

    def get(self) -> list[Tensor]:
        return [torch.tensor(self.number)]

    def close(self) -> None:
        self.closed = True


def test_a_frozen_channel_returns_its_last_message_and_sends_none() -> None:
    inner = Counting()
    channel = StaticChannel(inner)
    for number in (1, 2):
        channel.put([])
        assert not channel.ready()
        assert channel.get() == [number]
    channel.freeze()
    assert inner.closed
    for _ in range(2):
        channel.put([])
        assert channel.ready()
        assert channel.get() == [2]
    assert inner.number == 2
