"""Messages between displaced steps have a whole step to travel; no other generation reads them, and none is left."""

from typing import Any

import pytest

from tests.runtime.test_distributed import torchrun


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks of tests/runtime/underway.py saw."""
    return torchrun("tests.runtime.underway", folder=tmp_path_factory.mktemp("ranks"), transport="gloo")


def test_a_displaced_step_ends_before_anything_it_sent_has_left(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["overlap"]["error"] == "nothing"
        assert rank["overlap"]["equal"] == [True] * 6


def test_what_a_displaced_step_sends_is_received_in_the_next(seen: list[dict[str, Any]]) -> None:
    for flights in [rank["overlap"]["flights"] for rank in seen]:
        assert [(sent, received) for sent, received, _ in flights] == [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6)]
        (nodes,) = {count for _, _, count in flights}
        assert nodes >= 4
