"""Tiny seeded models, one per architecture, with inputs of any height: `small:NAME`, and the exactness tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .case import Case, output_tensors, randomise_constants
from .inputs import Draw, Size
from .library import diffusers
from .wrappers import Decode, Encode

__all__ = ["Case", "case", "cases", "output_tensors", "randomise_constants"]

# ---------------------------------------------------------------------------------------------------- UNets

_sd_config: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_sd_ups = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
_sdxl_config: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 24,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}


def _unet_sd() -> nn.Module:
    return diffusers.UNet2DConditionModel(**_sd_config, up_block_types=_sd_ups)


def _unet_sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(**_sdxl_config)


def _unet_2d() -> nn.Module:
    return diffusers.UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _unet_2d_resnet() -> nn.Module:
    """ADM's choices: down- and upsampling inside residual blocks, scale-shift norms, no padding, class labels."""
    return diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        downsample_padding=0,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=10,
    )


def _unet_3d() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _unet_motion() -> nn.Module:
    return diffusers.UNetMotionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        norm_num_groups=8,
    )


def _controlnet() -> nn.Module:
    model = diffusers.ControlNetModel(**_sd_config, conditioning_embedding_out_channels=(8, 8, 8, 16))
    with torch.no_grad():
        for name, parameter in model.controlnet_cond_embedding.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(3)  # torch's initialisation shrinks the signal at each of its eight layers
    return model


def _controlnet_residuals(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """ControlNet residuals for `unet`: one `[B, C, h, w]` per skip connection, and one for the middle block."""
    config, rows, cols = unet.config, size.rows, size.cols
    shapes = [(config.block_out_channels[0], rows, cols)]
    for level, channels in enumerate(config.block_out_channels):
        shapes += [(channels, rows, cols)] * config.layers_per_block
        if level + 1 < len(config.block_out_channels):
            rows, cols = -(-rows // 2), -(-cols // 2)
            shapes.append((channels, rows, cols))
    return {
        "down_block_additional_residuals": tuple(draw.normal(size.batch, *shape) for shape in shapes),
        "mid_block_additional_residual": draw.normal(size.batch, *shapes[-1]),
    }


# --------------------------------------------------------------------------------------------- transformers


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        out_channels=8,
        num_embeds_ada_norm=10,
        sample_size=16,
    )


def _pixart(additional: bool) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=36,
        caption_channels=24,
        sample_size=16,
        use_additional_conditions=additional,
    )


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=64,
        **options,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
    )


def _sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=16,
    )


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
    )


def _cogvideox(rotary: bool) -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=16,
        sample_height=32,
        sample_frames=5,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=rotary,
    )


# ----------------------------------------------------------------------------------------------------- VAEs


def _vae() -> diffusers.AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return diffusers.AutoencoderKL(**config, layers_per_block=1, norm_num_groups=4)


cases: tuple[Case, ...] = (
    Case("unet_sd", _unet_sd),
    Case("unet_sdxl", _unet_sdxl),
    Case("unet_sd_controlled", _unet_sd, extra=_controlnet_residuals),
    Case("controlnet", _controlnet),
    Case("unet_2d", _unet_2d, multiple=4),
    Case("unet_2d_resnet", _unet_2d_resnet, multiple=2),
    Case("unet_3d", _unet_3d, frames=3),
    Case("unet_motion", _unet_motion, frames=3),
    Case("dit", _dit, multiple=2, square=True, text=None),
    Case("pixart_alpha", lambda: _pixart(additional=True), multiple=2),
    Case("pixart_sigma", lambda: _pixart(additional=False), multiple=2),
    Case("sd3", sd3, multiple=2),
    Case("sd35", lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), multiple=2),
    Case("flux", _flux, multiple=2),
    Case("hunyuan_dit", _hunyuan_dit, multiple=2, text=None),
    Case("sana", _sana),
    Case("wan", _wan, multiple=2, frames=3),
    Case("cogvideox_2b", lambda: _cogvideox(rotary=False), multiple=2, frames=2),
    Case("cogvideox_5b", lambda: _cogvideox(rotary=True), multiple=2, frames=2),
    Case("vae_decode", lambda: Decode(_vae()), covers="AutoencoderKL"),
    Case("vae_encode", lambda: Encode(_vae()), covers="AutoencoderKL"),
)


def case(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: there is none.
    """
    return {each.name: each for each in cases}[name]
