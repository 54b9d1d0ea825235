"""Every rank runs a script: exact, and every disagreement and failure is named on every rank."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forks import ROOT, Forked
from tests.torchrun import ENVIRONMENT, SERVERS, TRANSPORTS, found, torchrun


@pytest.fixture(scope="module", params=TRANSPORTS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    seen = torchrun("tests.runtime.ranks", "everything", folder=folder, transport=request.param)
    assert [rank["files"] > 0 for rank in seen] == [request.param == "memory"] * 2
    return seen


def test_torchrun_equals_lockstep_bit_for_bit(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["backend"] == "gloo"
        assert rank["equal"] == [True] * 4
        assert rank["group"]
        assert {"halo", "moments", "keys_values", "output"} <= rank["traffic"].keys()


def test_the_parts_of_a_pipeline_share_connections_and_count_their_own_traffic(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["pipeline"]["equal"] == [True] * 5
        assert rank["pipeline"]["shared"]
        assert rank["pipeline"]["gone"]
        assert len(set(rank["pipeline"]["traffic"])) == 2


def test_a_call_from_a_second_thread_is_refused_and_the_first_one_goes_on(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        refused = rank["pipeline"]["refused"]
        assert refused.startswith("RuntimeError after <30 s: the thread 'another_0' calls a parallel module whose")
        assert "came from 'MainThread'" in refused
        assert "through a queue" in refused
        assert rank["pipeline"]["equal"][-1]


def test_a_part_feeds_its_denoiser_as_in_lockstep_though_rank_0_alone_looks_at_its_results(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        assert rank["feeds"]["equal"] == [True] * 8
        assert rank["feeds"]["alone"][0]
        assert not rank["feeds"]["alone"][1]


def test_displaced_steps_on_processes_equal_lockstep_bit_for_bit(seen: list[dict[str, Any]]) -> None:
    assert [rank["displaced"] for rank in seen] == [[True] * 6] * 2


def test_an_exact_step_in_the_middle_of_a_generation_is_the_same_in_lockstep(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["middle"] == [True] * 8
        assert rank["exact"] == [k in (0, 1, 4) for k in range(8)]


def test_memory_between_displaced_steps_is_at_most_two_of_each_message(seen: list[dict[str, Any]]) -> None:
    for held in [rank["held"] for rank in seen if rank["files"]]:  # gloo's buffers are not the kernel's to count
        rounding = 4096 * (4 * held["nodes"] + 4)  # to pages, at both ends of each of two buffers
        assert held["received"] > 4 * rounding
        assert held["received"] <= held["used"] <= 2 * (held["received"] + held["other"] + held["sent"]) + rounding


def test_ranks_that_take_turns_being_late_never_read_messages_of_another_step(seen: list[dict[str, Any]]) -> None:
    assert all(rank["unsteady"] for rank in seen)


def test_a_thousand_displaced_steps_hold_as_much_as_ten(seen: list[dict[str, Any]]) -> None:
    for held in [rank["endures"] for rank in seen]:
        assert held["10"]["storages"] > 10
        assert all(held["1000"][what] <= held["10"][what] for what in held["10"]), held


def test_messages_in_flight_do_not_alias_memory_of_the_model(seen: list[dict[str, Any]]) -> None:
    """So a compiled program may reuse the memory of a value as soon as it is launched."""
    assert all(rank["copied"] for rank in seen)


def test_a_closed_module_gives_its_shared_memory_back(seen: list[dict[str, Any]]) -> None:
    assert [rank["files of closed modules"] for rank in seen] == [0, 0]


def test_ranks_that_all_hold_nan_agree(seen: list[dict[str, Any]]) -> None:
    assert all(rank["nan"] for rank in seen)


def test_another_world_size_is_refused_at_once(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "world_size is 3, but the process group has 2 ranks" in rank["other world"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "rank 1 differs from rank 0 in the weight key.weight"),
        ("inputs", "rank 1 was called with another value of `sample` than rank 0"),
        ("shapes", "rank 1 differs from rank 0 in the input sample: (2, 4, 18, 8)"),
    ],
)
def test_a_difference_between_ranks_is_named_on_every_rank(seen: list[dict[str, Any]], what: str, words: str) -> None:
    for rank in seen:
        assert rank[what].startswith("DisagreementError after <30 s")
        assert words in rank[what]


def test_a_call_with_unlike_inputs_fails_on_every_rank_and_the_next_one_succeeds(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        first, unlike, *after = rank["drifting"]
        assert (first, *after) == ("nothing",) * 3
        assert unlike.startswith("DisagreementError after <30 s: rank 1 was called with another value of `sample`")
        first, second, unlike, after = rank["unlike steps"]
        assert (first, second, after) == ("nothing",) * 3
        assert unlike.startswith("DisagreementError after <30 s: rank 1 was called with another value of `time")


def test_a_rank_that_leaves_a_picture_early_is_named_and_the_next_picture_succeeds(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        *picture, cut, again = rank["left early"]
        assert picture == ["nothing"] * 2
        assert cut.startswith("DisagreementError after <30 s: rank 1 is at call 1 of a generation, rank 0 at call 3")
        assert again == "nothing"


def test_ranks_that_wait_for_each_other_in_different_calls_are_told_at_once(seen: list[dict[str, Any]]) -> None:
    known, new = "a call of plan 2 (of sample, timestep)", "the first call of plan 3 (of sample, timestep)"
    places = f"rank 1 waits in {new}, but rank 0 in {known}", f"rank 0 waits in {known}, but rank 1 in {new}"
    for rank in seen:
        first, second = rank["pipeline"]["apart"]
        assert first.startswith("RankError after <30 s: rank ")
        assert any(place in first for place in places)
        assert "cannot go on after an earlier call" in second or "can make no further call" in second


def test_a_rank_whose_module_was_closed_is_not_waited_for(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["closed"].startswith("RankError after <10 s: rank 1 can make no further call")
    assert "this parallel module was closed" in seen[1]["closed"]


def test_a_rank_that_does_not_call_is_reported(seen: list[dict[str, Any]]) -> None:
    assert "RankError after <30 s: rank 0 waited 2 s for the other ranks" in seen[0]["absent"]


def test_an_error_on_one_rank_is_raised_on_the_others(seen: list[dict[str, Any]]) -> None:
    assert "mat1 and mat2" in seen[1]["raises"]
    assert seen[0]["raises"].startswith("RankError after <30 s: rank 1 failed: Traceback")
    assert "mat1 and mat2" in seen[0]["raises"]
    assert "cannot go on" in seen[0]["after"]


def test_ranks_of_different_numbers_of_groups_meet_in_each_group(tmp_path: Path) -> None:
    seen = torchrun("tests.runtime.ranks", "uneven", folder=tmp_path, world=3)
    assert [rank["equal"] for rank in seen] == [[True], [True, True], [True]]
    before, pairs, all_ranks = zip(*(rank["speaks"] for rank in seen), strict=True)  # the first of each group
    assert (before, pairs, all_ranks) == ((True, False, False), (True, True, False), (True, True, False))


def test_of_all_ranks_the_first_one_warns(seen: list[dict[str, Any]]) -> None:
    assert [rank["warns"] for rank in seen] == [True, False]


def test_a_first_call_on_one_rank_only_is_a_rank_error_that_says_who_must_call(tmp_path: Path) -> None:
    first, second = torchrun("tests.runtime.ranks", "alone", folder=tmp_path)[0]["errors"]
    assert first.startswith("RankError after <30 s: rank 0 did not meet the other processes")
    assert "each rank must make its first call of a parallel module within 2 s of the others" in first
    assert second.startswith("RuntimeError after <30 s: the ranks cannot go on after an earlier call")
    assert "start all processes again" in second


def test_an_error_on_one_rank_in_the_first_call_is_raised_on_the_others(tmp_path: Path) -> None:
    """Under torchrun itself; the ranks of other tests are forks with its environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.runtime.ranks", "first_call_fails", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    seen = found(tmp_path, 2)
    assert seen[0]["error"].startswith("RankError after <30 s: rank 1 failed: Traceback")
    assert all("mat1 and mat2" in rank["error"] for rank in seen)


@pytest.mark.parametrize("what", ["killed", "stopped"])
@pytest.mark.parametrize(("transport", "world"), [("memory", 3), ("gloo", 2)])
def test_a_killed_or_stopped_rank_is_reported_on_all_others(
    what: str, transport: str, world: int, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ENVIRONMENT | TRANSPORTS[transport]
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.runtime.ranks", what, str(tmp_path)]
    ranks = [Forked(command, env=shared | {"RANK": str(rank)}, server=SERVERS[rank % 2]) for rank in range(world)]
    survivors = [rank for rank in range(world) if rank != 1]
    assert [ranks[rank].wait(120) for rank in survivors] == [0] * len(survivors)
    ranks[1].kill()
    assert ranks[1].wait(10) == -signal.SIGKILL
    for rank in survivors:
        error = json.loads((tmp_path / f"{rank}.json").read_text())["error"]
        assert error.startswith(f"RankError after <{30 if what == 'killed' else 10} s: rank"), error
        assert ("lost its connection to" if what == "killed" else "its process is stopped") in error
