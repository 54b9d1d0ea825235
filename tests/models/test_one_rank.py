"""Parts of a pipeline that rank 0 of torchrun runs for all ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest

import fxpass
from tests.runtime.plans import Pipeline, block
from tests.torchrun import torchrun


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw, with a pipeline of the tests or of diffusers."""
    return torchrun("tests.models.one_rank_ranks", request.param, folder=tmp_path_factory.mktemp("ranks"))


def test_rank_0_runs_the_text_encoder_for_one_that_has_no_weights(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank["on_first"]
        assert max(found["equal"]) < 1e-5
        assert found["kind"]
    assert [rank["on_first"]["runs"] > 0 for rank in seen] == [True, False]


def test_a_wrong_name_is_an_error_that_lists_the_parts(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        error = rank["on_first"]["unknown"]
        assert "on_first_rank has 'unet' (which runs on all ranks), 'tokens'" in error
        assert re.search(r"can run on rank 0 alone: text_encoder \((CLIP)?Text(Model)?\)$", error)


def test_unlike_arguments_and_an_error_of_rank_0_reach_all_and_the_next_picture_succeeds(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        unlike = rank["on_first"]["unlike"]
        assert unlike.startswith("DisagreementError after <20 s: rank 1 calls text_encoder with another value of")
        assert rank["on_first"]["again"] < 1e-5
    first, second = (rank["on_first"]["fails"] for rank in seen)
    assert first.startswith("IndexError")
    assert second.startswith("RankError after <20 s: rank 0 failed: Traceback")
    assert "IndexError" in second


def test_a_rank_that_leaves_a_picture_and_begins_the_next_one_is_noticed_at_once(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["on_first"]["left"].startswith("KeyError")
    # one of them notices it, the other one hears of that
    errors = [rank["on_first"]["lost"] for rank in seen]
    assert all(error.startswith("RankError after <20 s: rank ") for error in errors)
    assert all("waits in a part that runs on rank 0 alone" in e or "in a part that runs on rank 0" in e for e in errors)
    assert any(" failed: Traceback" in error for error in errors)
    assert all(rank["on_first"]["anew"] < 1e-5 for rank in seen)


def test_rank_0_alone_shows_progress(seen: list[dict[str, Any]]) -> None:
    assert [rank["on_first"]["bars"] for rank in seen] == [False, True]
    assert [rank["on_first"]["restored bars"] for rank in seen] == [{"leave": False}] * 2


def test_restore_puts_the_text_encoder_back(seen: list[dict[str, Any]]) -> None:
    assert [rank["on_first"]["restored"] for rank in seen] == [0, 0]
    assert [rank["on_first"]["device"] for rank in seen] == ["cpu", "meta"]


def test_ranks_get_the_weights_that_rank_0_has_or_hear_why_not(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["weights"]["equal"] < 1e-5
        assert rank["weights"]["device"] == "cpu"
        assert rank["weights"]["unlike"].startswith(
            "DisagreementError after <20 s: rank 1 has float16 (16, 4, 3, 3) for"
        )


def test_pipelines_made_of_others_whose_parts_have_the_same_names_have_all_of_them(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["weights"]["both"] == "nothing"
        assert rank["weights"]["both_equal"] < 1e-5


def test_in_pipelines_made_of_others_rank_0_also_runs_parts_whose_hooks_were_set_again(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        assert rank["weights"]["hooks"] == "nothing"
        assert rank["weights"]["hooks_equal"] < 1e-5
        assert not rank["weights"]["restored"]


def test_random_numbers_that_rank_0_draws_for_all_leave_the_generators_of_all_alike(seen: list[dict[str, Any]]) -> None:
    assert all(rank["drawn"] < 1e-5 for rank in seen)


def test_weights_on_the_cpu_do_not_decide_how_later_calls_connect(seen: list[dict[str, Any]]) -> None:
    assert not any(rank["weights"]["connected"] for rank in seen)


def test_names_are_checked_where_one_process_runs_the_parts_anyway() -> None:
    pipe: Any = Pipeline(unet=block(), scheduler=None)
    with pytest.raises(ValueError, match=r"has 'text', but these are the parts .* alone: none"):
        fxpass.parallelize(pipe, 2, executor="lockstep", on_first_rank="text")
    for wrong in (5, None, [None]):
        with pytest.raises(ValueError, match="on_first_rank is True, False, a name or names of parts, not"):
            fxpass.parallelize(pipe, 2, executor="lockstep", on_first_rank=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="names parts of a pipeline"):
        fxpass.parallelize(block(), 2, executor="lockstep", on_first_rank=True)
    fxpass.restore(fxpass.parallelize(pipe, 2, executor="lockstep", on_first_rank=True))
