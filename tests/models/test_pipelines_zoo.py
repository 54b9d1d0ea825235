"""Whole pipelines, built small: a class of each kind here; `make pipelines` sweeps them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.models.pipelines_zoo import RECIPES, build, names
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.tools.sweeps import pipelines_case
from fxpass.tools.sweeps.pipelines_case import (
    DOUBLE,
    PICTURE,
    Found,
    difference,
    in_double,
    measure,
    outputs,
    overheard,
    split_parts,
)

#: classes of different kinds, and the parts that exchange something in each
SLICE: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("unet", "vae"),
    "FluxPipeline": ("transformer", "vae"),
    "StableDiffusion3PAGPipeline": ("transformer", "vae"),
    "CogView4Pipeline": ("transformer", "vae"),
    "SanaPipeline": ("transformer", "vae"),
    "ConsistencyModelPipeline": ("unet",),
}


@pytest.mark.parametrize("name", SLICE)
def test_a_split_pipeline_gives_the_unsplit_result(name: str) -> None:
    found = Found.of(measure(name, ""))
    assert (found.verdict, found.failed, found.refused, found.blind, found.whole) == ("equal", "", "", "", ())
    assert found.split == SLICE[name]


def test_a_corrupted_exchange_changes_the_result_of_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(name: str, exchange: Any, source: int, target: int, payload: Tensor) -> Tensor:
        return payload + 0.5 if payload.is_floating_point() else payload

    small = build("StableDiffusionPipeline")
    expected = small.run()
    monkeypatch.setattr(LockstepExecutor, "tamper", property(lambda _: corrupt, lambda *_: None), raising=False)
    fxpass.parallelize(small.pipeline, 2, executor="lockstep")
    assert difference(small.run(), expected) > 100 * PICTURE


def test_pipelines_of_motion_are_split_though_they_build_their_unet_in_training_mode() -> None:
    small = build("AnimateDiffPipeline")
    assert small.pipeline.unet.training
    expected = small.run()
    fxpass.parallelize(small.pipeline, 2, executor="lockstep")
    assert difference(small.run(), expected) <= PICTURE
    assert split_parts(small.pipeline) == ("unet", "vae")


def test_every_recipe_is_of_a_class_that_diffusers_exports() -> None:
    assert sorted(set(RECIPES) - set(names())) == []


def test_classes_that_are_left_out_say_why() -> None:
    reasons = [recipe.left_out for recipe in RECIPES.values() if recipe.left_out]
    assert all(len(reason) > 20 for reason in reasons)


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({"left_out": "needs the package x"}, "left out"),
        ({"refused": "RuntimeError: no"}, "refused"),
        ({"failed": "ValueError: no"}, "failed"),
        ({"none": "TypeError: no denoiser"}, "none"),
        ({"error": 5e-5}, "equal"),
        ({"error": 1e-3, "calls": 1e-6, "noise": 5e-4}, "amplifies"),
        ({"error": 1e-3, "calls": 1e-6, "noise": 5e-6}, "wrong"),
        ({"error": 1e-3, "calls": 1e-3, "noise": 5e-4}, "wrong"),
        ({"error": 1e-3, "calls": 1e-4, "double": 1e-8, "noise": 5e-4}, "amplifies"),
        ({"error": 1e-3, "calls": 1e-6, "double": 1e-4, "noise": 5e-4}, "wrong"),
        ({"error": 1e-3, "calls": float("nan"), "double": float("nan"), "noise": 5e-4}, "wrong"),
        ({"error": float("nan"), "calls": 1e-6, "noise": 5e-4}, "wrong"),
    ],
)
def test_a_difference_counts_as_amplified_only_if_calls_are_exact_and_noise_does_the_same(
    facts: dict[str, Any], verdict: str
) -> None:
    assert Found("name", "key", **facts).verdict == verdict


def test_differences_are_relative_where_values_are_large_and_never_hide_nan_or_shapes() -> None:
    x = torch.tensor([1.0, 200.0])
    assert difference([x + 0.02], [x]) == pytest.approx(1e-4, rel=1e-3)
    assert not difference([x * float("nan")], [x]) <= PICTURE
    assert not difference([x, x * float("nan")], [x, x]) <= PICTURE
    assert difference([x[:1]], [x]) == float("inf")


def test_encoders_are_heard_as_denoisers_and_decoders_are() -> None:
    small = build("StableDiffusionImg2ImgPipeline")
    heard: list[tuple[str, int]] = []
    with overheard(small, lambda call, output: heard.append((call.method, len(outputs(output))))):
        small.run()
    assert [heard[0], heard[1], heard[-1]] == [("encode", 1), ("forward", 1), ("decode", 1)]
    assert not {"forward", "encode", "decode"} & {*vars(small.pipeline.unet), *vars(small.pipeline.vae)}


def test_results_in_float64_are_equal_to_more_digits() -> None:
    found = in_double("ConsistencyModelPipeline")
    assert found is not None
    assert found <= DOUBLE


def test_a_pipeline_that_does_not_run_in_float64_is_not_compared_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Single:
        pipeline = torch.nn.Identity()

        def run(self) -> list[Tensor]:
            raise RuntimeError("expected Float, got Double")

    monkeypatch.setattr(pipelines_case, "build", lambda name: Single())
    assert in_double("SinglePipeline") is None
