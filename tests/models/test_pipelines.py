"""Where pipelines keep their denoisers."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

import fxpass
from fxpass.models.case import randomise_constants
from fxpass.models.pipelines import beside, denoisers
from fxpass.runtime.calls.generation import Generation
from tests.runtime.plans import Pipeline, block, inputs, whole
from tests.tools.pipelines import VAE, write_pipeline


class TextEncoder(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


class SomeControlNetModel(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def test_denoisers_are_found_under_any_name_the_main_one_first() -> None:
    held = Pipeline(
        text_encoder=TextEncoder(),
        super_res_first=block(),
        controlnet=SomeControlNetModel(),
        decoder=block(),
        unet=block(),
        scheduler=DDIMScheduler(),
    )
    assert denoisers(held) == ["unet", "super_res_first", "decoder"]
    assert beside(held) == ["controlnet"]


class Ratio(nn.Module):
    def forward(self, x: Tensor, r: Tensor, effnet: Tensor) -> Tensor:
        return x


def test_a_denoiser_that_takes_its_time_as_a_ratio_is_found() -> None:
    assert denoisers(Pipeline(decoder=Ratio(), text_encoder=TextEncoder())) == ["decoder"]


def test_a_real_denoiser_is_found_by_its_forward() -> None:
    model = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    assert denoisers(Pipeline(image_unet=model)) == ["image_unet"]


def generation(model: nn.Module) -> Generation:
    return fxpass.parallel(model)._engine._generations.current()


def test_a_denoiser_is_split_wherever_a_pipeline_of_pipelines_holds_it() -> None:
    prior, unet = block(), block()
    inner: Any = Pipeline(unet=unet, scheduler=DDIMScheduler())
    first: Any = Pipeline(prior=prior, scheduler=DDIMScheduler())
    combined: Any = Pipeline(
        prior_pipe=first,
        decoder_pipe=inner,
        unet=unet,
        prior_prior=prior,
        scheduler=inner.scheduler,
        text=TextEncoder(),
    )
    assert fxpass.parallelize(combined, 2, strategy="displaced", executor="lockstep") is combined
    assert combined.unet is inner.unet is unet
    assert combined.prior_prior is first.prior is prior
    inner.scheduler.set_timesteps(7)
    first.scheduler.set_timesteps(5)
    assert len(generation(unet).timesteps) == 7
    assert len(generation(prior).timesteps) == 5
    wrapped = inner.scheduler.set_timesteps
    for _ in range(2):
        unet(*inputs())
    assert inner.scheduler.set_timesteps == wrapped  # announced once, not once more at each call


@pytest.mark.parametrize("thing", [3, SimpleNamespace(text=TextEncoder()), "unet"])
def test_what_has_no_denoiser_is_refused_with_the_modules_that_it_has(thing: Any) -> None:
    held = r" \(its modules: text: TextEncoder\)" if isinstance(thing, SimpleNamespace) else ""
    with pytest.raises(TypeError, match=f"nor a pipeline with a denoiser, whose forward takes a timestep{held}; give"):
        fxpass.parallelize(thing, 2)


def test_the_error_for_an_unknown_pipeline_says_which_module_looks_like_a_denoiser() -> None:
    class Net(nn.Module):
        def forward(self, sample: Tensor, level: Tensor) -> Tensor:
            return sample

    with pytest.raises(TypeError, match=r"text: TextEncoder; net: Net, which looks like .*takes sample, level\)"):
        fxpass.parallelize(SimpleNamespace(text=TextEncoder(), net=Net()), 2)


def test_a_pipeline_that_never_denoises_has_its_autoencoder_split() -> None:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**VAE).eval()
    pipeline = Pipeline(vae=vae, upsampler=nn.Conv2d(4, 4, 1))
    z = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        expected = vae.decode(z).sample
        with pytest.warns(
            fxpass.FxpassWarning, match=r"has no denoiser.*upsampler: Conv2d.*only its autoencoders are split"
        ):
            fxpass.parallelize(pipeline, 2, executor="lockstep")
        torch.testing.assert_close(vae.decode(z).sample, expected, atol=1e-5, rtol=0)
    assert exchanged(vae) == [True]


def test_a_denoiser_under_another_name_is_split_and_exact() -> None:
    pipeline: Any = Pipeline(decoder=block(), scheduler=DDIMScheduler())
    expected = whole(pipeline.decoder, *inputs())
    fxpass.parallelize(pipeline, 2, executor="lockstep")
    torch.testing.assert_close(pipeline.decoder(*inputs())["sample"], expected)
    assert fxpass.parallel(pipeline.decoder).traffic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def loaded(folder: Path, kind: Any = StableDiffusionPipeline) -> Any:
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="np", **options).images


def assert_same_picture(found: Any, expected: Any) -> None:
    assert np.abs(found - expected).max() < 1e-4


def exchanged(*models: nn.Module) -> list[bool]:
    return [bool(fxpass.parallel(model).traffic) for model in models]


def test_denoiser_and_autoencoder_of_a_pipeline_are_split_in_place_and_make_the_same_picture(
    folder: Path, tmp_path: Path
) -> None:
    pipe = loaded(folder)
    expected, parts = drawn(pipe), dict(pipe.components)
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert_same_picture(drawn(pipe), expected)
    assert exchanged(pipe.unet, pipe.vae) == [True, True]
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert type(pipe.unet) is UNet2DConditionModel
    assert type(pipe.vae) is AutoencoderKL
    with pytest.raises(ValueError, match="CLIPTextModel is not parallel"):
        fxpass.parallel(pipe.text_encoder)
    pipe.save_pretrained(tmp_path)
    assert_same_picture(drawn(loaded(tmp_path)), expected)
    fxpass.restore(pipe)
    assert_same_picture(drawn(pipe), expected)
    assert not {"forward", "decode", "encode"} & {*vars(pipe.unet), *vars(pipe.vae)}


def test_pipelines_are_made_from_parallel_ones_in_both_directions(folder: Path) -> None:
    start = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)), "strength": 1.0}
    text, image = loaded(folder), loaded(folder, StableDiffusionImg2ImgPipeline)
    expected = drawn(text), drawn(image, **start)
    fxpass.parallelize(text, 2, executor="lockstep")
    other: Any = StableDiffusionImg2ImgPipeline.from_pipe(text)
    other.set_progress_bar_config(disable=True)
    assert other.unet is text.unet
    assert_same_picture(drawn(other, **start), expected[1])
    assert exchanged(other.unet, other.vae) == [True, True]
    again: Any = StableDiffusionPipeline.from_pipe(other)
    assert_same_picture(drawn(again), expected[0])
    handle = fxpass.parallel(text.unet)
    fxpass.parallelize(again, 3, executor="lockstep")  # parts that pipelines share are split once
    assert fxpass.parallel(text.unet) is fxpass.parallel(again.unet) is handle
    for pipe, options, picture in ((text, {}, expected[0]), (other, start, expected[1]), (again, {}, expected[0])):
        assert_same_picture(drawn(pipe, **options), picture)
    assert handle.plan is not None
    assert handle.plan.world_size == 3
    fxpass.restore(again)
    for pipe, options, picture in ((text, {}, expected[0]), (other, start, expected[1])):
        assert_same_picture(drawn(pipe, **options), picture)
    assert "set_timesteps" not in vars(text.scheduler)


def test_a_copied_pipeline_runs_unsplit_and_can_be_split_itself(folder: Path) -> None:
    pipe = loaded(folder)
    expected = drawn(pipe)
    fxpass.parallelize(pipe, 2, executor="lockstep")
    other = copy.deepcopy(pipe)
    with pytest.warns(fxpass.FxpassWarning, match="is a copy of a parallel one"):
        assert_same_picture(drawn(other), expected)
    assert exchanged(pipe.unet, pipe.vae) == [False, False]
    fxpass.parallelize(other, 2, executor="lockstep")
    assert_same_picture(drawn(other), expected)
    assert exchanged(other.unet, other.vae) == [True, True]


def test_a_tiled_pipeline_makes_the_tiled_picture(folder: Path) -> None:
    pipe = loaded(folder)
    whole = drawn(pipe)
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 32
    pipe.vae.enable_tiling()
    tiled = drawn(pipe)
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert_same_picture(drawn(pipe), tiled)
    pipe.vae.disable_tiling()
    assert_same_picture(drawn(pipe), whole)


def test_a_controlnet_is_split_too_and_runs_unsplit_where_it_cannot_be(folder: Path) -> None:
    base = loaded(folder)
    torch.manual_seed(0)
    control: Any = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16))
    randomise_constants(control.eval())
    pipe: Any = StableDiffusionControlNetPipeline(**base.components, controlnet=control, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = drawn(pipe, image=image)
    assert np.abs(expected - drawn(base)).max() > 1e-3
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert_same_picture(drawn(pipe, image=image), expected)
    assert exchanged(pipe.unet, pipe.controlnet, pipe.vae) == [True, False, True]
    assert fxpass.parallel(pipe.controlnet).plan is fxpass.parallel(pipe.unet).plan  # both run in one program
    control.register_forward_pre_hook(lambda *_: None)
    control.conv_in.register_forward_hook(lambda module, args, output: output + 0 * torch.rand(1))
    with pytest.warns(fxpass.FxpassWarning, match=r"ControlNetModel\.forward runs unsplit on every rank"):
        assert_same_picture(drawn(pipe, image=image), expected)
