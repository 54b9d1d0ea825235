"""Messages of displaced steps have a whole step to travel; no other generation reads them, and none stays unread."""

from typing import Any

import pytest

from tests.torchrun import torchrun

MB = 1 << 20


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks of tests/runtime/underway.py saw."""
    return torchrun("tests.runtime.underway", folder=tmp_path_factory.mktemp("ranks"), transport="gloo")


@pytest.fixture(params=["stale_gn", "compressed"])
def broken_off(request: pytest.FixtureRequest, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of a generation that did not come to its end."""
    return [rank["leaks"][request.param] for rank in seen]


def test_a_displaced_step_ends_before_anything_it_sent_has_left(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["overlap"]["error"] == "nothing"
        assert rank["overlap"]["equal"] == [True] * 6


def test_messages_of_a_displaced_step_are_received_in_the_next_step(seen: list[dict[str, Any]]) -> None:
    for flights in [rank["overlap"]["flights"] for rank in seen]:
        assert [(sent, received) for sent, received, _ in flights] == [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6)]
        (nodes,) = {count for _, _, count in flights}
        assert nodes >= 4


@pytest.mark.parametrize("event", ["reset", "risen", "refused", "shape", "shape again"])
def test_a_generation_is_as_if_there_had_been_no_other(event: str, broken_off: list[dict[str, Any]]) -> None:
    for rank in broken_off:
        assert rank[event] == [True] * 5
        assert rank["call refused"].startswith("TypeError")


def test_a_channel_receives_what_is_under_way_before_it_sends(broken_off: list[dict[str, Any]]) -> None:
    for rank in broken_off:
        assert rank["before"] >= 4
        assert rank["between"] == rank["before"]
        assert rank["two shapes"] == 2 * rank["before"]  # another shape is another program, which has its own channels
        assert rank["overwritten"] == 0


def test_a_closed_module_leaves_no_message_no_channel_and_no_thread(broken_off: list[dict[str, Any]]) -> None:
    assert [rank["closed"] for rank in broken_off] == [[0, 0, 0]] * 2


@pytest.mark.parametrize("who", ["all", "one"])
def test_an_exception_within_a_step_leaves_no_message_behind(who: str, broken_off: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(broken_off):
        first, *later = rank[f"{who} raise"]
        assert "ArithmeticError: only once" in first or first == "ArithmeticError after <30 s: only once"
        assert first.startswith("RankError after <30 s: rank 1 failed") == (who == "one" and number == 0)
        assert all("the ranks cannot go on after an earlier call" in error for error in later)
        assert rank[f"{who} raise, closed"] == ["nothing", 0, 0, 0]
        assert rank["another"] == [True] * 5


def test_two_hundred_generations_hold_as_much_as_forty(seen: list[dict[str, Any]]) -> None:
    for growth in [rank["growth"] for rank in seen]:
        for what in ("channels", "under way"):
            assert len(set(growth[what])) == 1, what
        # gloo's threads may hold what a channel sent a little longer; one tensor left by each generation would be 160
        assert growth["tensors"][-1] - growth["tensors"][0] <= 2 * growth["channels"][0] < 40
        assert growth["received"] > 16 * MB
        assert growth["memory"][-1] - growth["memory"][0] < 3 * MB
