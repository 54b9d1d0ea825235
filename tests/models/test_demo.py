"""The trained demo pipeline draws what a prompt says; its training scenes are a function of their seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import fxpass.models
from fxpass.tools.demo.measure import fact
from fxpass.tools.demo.scenes import COLOURS, SHAPES, Scene, draw_scene, read_things, render

FOLDER = Path(fxpass.models.__file__).resolve().parent / "demo"


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folder_loads_in_single_precision_and_is_small(pipeline: DiffusionPipeline) -> None:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 20e6


def test_every_word_of_the_grammar_is_one_token(pipeline: DiffusionPipeline) -> None:
    words = [*draw_scene(np.random.default_rng(0)).caption.replace(",", " ,").split(), *COLOURS, *SHAPES]
    assert [len(pipeline.tokenizer.tokenize(word)) for word in words] == [1] * len(words)


@pytest.mark.parametrize(
    ("prompt", "thing"),
    [
        ("a red circle on the left, white background", ("circle", "red", "on the left")),
        ("a blue square at the bottom right on a black background", ("square", "blue", "at the bottom right")),
    ],
)
def test_an_image_shows_what_the_prompt_says(pipeline: Any, prompt: str, thing: tuple[str, str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 15, "guidance_scale": 2.0, "output_type": "np"}
    picture = pipeline(prompt, generator=generator, **options).images[0]
    assert picture.shape == (128, 128, 3)
    assert read_things(picture) == [thing]


def test_the_same_seed_gives_the_same_scene() -> None:
    def one(seed: int) -> tuple[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        return scene.paraphrase(rng), render(scene, 64, 96, rng)

    assert one(3)[0] == one(3)[0] != one(4)[0]
    np.testing.assert_array_equal(one(3)[1], one(3)[1])


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (128, 192)])
def test_the_reader_finds_what_was_drawn(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(8):
        scene = draw_scene(rng, held_out=True)
        assert read_things(render(scene, *size, rng)) == [fact(scene)], scene.caption


def test_held_out_scenes_are_never_drawn_for_training() -> None:
    rng = np.random.default_rng(2)
    assert not any(draw_scene(rng).held_out for _ in range(200))
    assert all(draw_scene(rng, held_out=True).held_out for _ in range(20))


def test_a_scene_is_named_with_its_article() -> None:
    scene = Scene("star", "orange", "striped", "at the top", "night")
    assert scene.caption == "an orange striped star at the top, night background"


def test_the_second_demo_draws_classes_that_it_was_not_trained_on_also_when_it_is_split() -> None:
    folder = FOLDER.with_name("demo_dit")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20e6
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    unseen = Scene("circle", "blue", "plain", "on the right", "white")
    assert unseen.held_out
    ids = pipeline.get_label_ids([f"{unseen.thing} {unseen.position} on a {unseen.background} background"])
    options: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 2.5, "output_type": "np"}
    whole, exact, stale = (_drawn(pipeline, ids, options, strategy) for strategy in (None, "sync", "displaced"))
    assert read_things(whole) == [fact(unseen)] == read_things(stale)
    assert np.abs(exact - whole).max() < 1e-3
    assert np.abs(stale - whole).max() > 1e-5


def _drawn(pipeline: Any, ids: list[int], options: dict[str, Any], strategy: str | None) -> np.ndarray:
    original = pipeline.transformer
    if strategy is not None:
        fxpass.parallelize(pipeline, 2, strategy=strategy, executor="lockstep")
    try:
        return pipeline(ids, generator=torch.Generator().manual_seed(0), **options).images[0]
    finally:
        pipeline.transformer = original
