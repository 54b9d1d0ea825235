"""Where pipelines keep their denoisers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

import fxpass
from fxpass.models.pipelines import denoisers
from fxpass.runtime.module import ParallelModule
from tests.runtime.plans import Pipeline, block


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


def test_a_real_denoiser_is_found_by_its_forward() -> None:
    model = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    assert denoisers(Pipeline(image_unet=model)) == ["image_unet"]


def test_a_denoiser_is_replaced_wherever_a_pipeline_of_pipelines_holds_it() -> None:
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
    assert type(inner.unet) is ParallelModule
    assert inner.unet is combined.unet
    assert first.prior is combined.prior_prior
    assert inner.unet.unwrapped is unet
    assert first.prior.unwrapped is prior
    inner.scheduler.set_timesteps(7)
    first.scheduler.set_timesteps(5)
    assert len(inner.unet._engine._generations.current().timesteps) == 7
    assert len(first.prior._engine._generations.current().timesteps) == 5
    wrapped = inner.scheduler.set_timesteps
    for pipeline in (combined, inner):
        pipeline.unet._engine.before_call()
    assert inner.scheduler.set_timesteps == wrapped  # announced once, not once more at each call


@pytest.mark.parametrize("thing", [3, SimpleNamespace(text=TextEncoder()), "unet"])
def test_what_has_no_denoiser_is_refused_with_the_modules_that_it_has(thing: Any) -> None:
    held = r" \(its modules: text: TextEncoder\)" if isinstance(thing, SimpleNamespace) else ""
    with pytest.raises(TypeError, match=f"nor a pipeline with a denoiser, whose forward takes a timestep{held}; give"):
        fxpass.parallelize(thing, 2)


def test_a_denoiser_under_another_name_is_split_and_exact() -> None:
    pipeline: Any = Pipeline(decoder=block(), scheduler=DDIMScheduler())
    fxpass.parallelize(pipeline, 2, executor="lockstep")
    sample, timestep = torch.randn(2, 4, 16, 8), torch.tensor([0.3])
    with torch.no_grad():
        expected = pipeline.decoder.unwrapped(sample, timestep)["sample"]
    torch.testing.assert_close(pipeline.decoder(sample, timestep)["sample"], expected)
    assert pipeline.decoder.traffic
