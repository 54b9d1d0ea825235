"""Transformers of images that take the latent as packed tokens, `[B, N, C]`."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ..case import Case
from ..inputs import Draw, Size
from ..inputs.images_tokens import flux_2_reference, flux_3_reference, grid

_small: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
_joint: dict[str, Any] = _small | {"in_channels": 16, "num_single_layers": 2}


def _bria() -> nn.Module:
    return diffusers.BriaTransformer2DModel(**_joint)


def _bria_fibo() -> nn.Module:
    return diffusers.BriaFiboTransformer2DModel(**_joint, guidance_embeds=True, text_encoder_dim=20)


def _chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        **_joint, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2
    )


def _flux_2() -> nn.Module:
    config: dict[str, Any] = _joint | {"axes_dims_rope": (4, 4, 4, 4)}
    return diffusers.Flux2Transformer2DModel(**config, timestep_guidance_channels=16)


def _flux_3(**options: Any) -> nn.Module:
    return diffusers.Flux3Transformer2DModel(
        **_joint | {"axes_dims_rope": (4, 4, 4, 4)}, cond_in_channels=12, timestep_channels=16, **options
    )


def _ideogram() -> nn.Module:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=12,
        llm_features_dim=24,
        mrope_section=(4, 2, 2),
    )


def _krea() -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        axes_dims_rope=(4, 6, 6),
    )


def _nucleus() -> nn.Module:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        **_small | {"num_layers": 3, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)},
        in_channels=16,
        out_channels=4,
        num_key_value_heads=1,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=24,
        capacity_factors=2.0,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.1)  # the class leaves them uninitialised
    return model


def _qwen(**options: Any) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(**_small, in_channels=16, out_channels=4, **options)


def _qwen_21() -> nn.Module:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def _control(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """ControlNet residuals after the two-stream blocks."""
    rows, cols = grid(size)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return {"controlnet_block_samples": [draw.normal(size.batch, rows * cols, width) for _ in range(2)]}


def _control_single(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The same, and residuals for the image's part of the joint stream."""
    single = _control(transformer, size, draw)["controlnet_block_samples"]
    return _control(transformer, size, draw) | {"controlnet_single_block_samples": single}


CASES: tuple[Case, ...] = (
    Case("flux_2", _flux_2, multiple=2),
    Case("flux_2_edit", _flux_2, multiple=2, extra=flux_2_reference),
    Case("qwen_image", _qwen, multiple=2),
    Case("qwen_image_controlled", _qwen, multiple=2, extra=_control),
    Case("qwen_image_edit", lambda: _qwen(zero_cond_t=True), multiple=4),
    Case("qwen_image_layered", lambda: _qwen(use_layer3d_rope=True, use_additional_t_cond=True), multiple=4),
    Case("qwen_image_21", _qwen_21, multiple=4),
    Case("chroma", _chroma, multiple=2),
    Case("chroma_controlled", _chroma, multiple=2, extra=_control_single),
    Case("flux_3", _flux_3, multiple=2),
    Case("flux_3_edit", lambda: _flux_3(flow_map=True), multiple=2, extra=flux_3_reference),
    Case("krea_2", _krea, multiple=2),
    Case("ideogram_4", _ideogram, multiple=2),
    Case(
        "longcat_image",
        lambda: diffusers.LongCatImageTransformer2DModel(**_joint, pooled_projection_dim=24),
        multiple=2,
    ),
    Case("ovis_image", lambda: diffusers.OvisImageTransformer2DModel(**_joint, out_channels=16), multiple=2),
    Case("nucleus_moe_image", _nucleus, multiple=2),
    Case("bria", _bria, multiple=2),
    Case("bria_controlled", _bria, multiple=2, extra=_control),
    Case("bria_fibo", _bria_fibo, multiple=2),
)

LEFT_OUT: dict[str, str] = {}
