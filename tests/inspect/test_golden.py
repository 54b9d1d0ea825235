"""Dumps and plans stay as they are until someone means to change them."""

import pytest

from tests.inspect.golden import FOLDER, PLANS, files


@pytest.mark.parametrize("name", PLANS)
def test_the_dump_and_the_plan_of_a_model_are_those_of_the_golden_files(name: str) -> None:
    made = files(name)
    assert {path.name for path in FOLDER.iterdir() if path.stem.removesuffix("_unfolded") == name} == made.keys()
    for file, content in made.items():
        hint = f"{file} has changed; if that is meant, run python -m tests.inspect.golden and read the diff"
        assert content == FOLDER.joinpath(file).read_text(), hint
