"""Autoencoders of images, one case per half."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ..case import Case
from ..inputs import Draw, Size
from .autoencoder_halves import Pictures, halves

_kl: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def _asymmetric() -> nn.Module:
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 24),
        norm_num_groups=4,
    )


def _masked(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    """The image to inpaint, and its mask."""
    rows, cols = 2 * size.rows, 2 * size.cols
    return {
        "image": draw.normal(size.batch, 3, rows, cols),
        "mask": draw.integers(2, size.batch, 1, rows, cols).to(draw.dtype),
    }


def _dc(**options: Any) -> nn.Module:
    """Residual blocks at full size, linear attention on several scales in the middle."""
    config: dict[str, Any] = {
        "latent_channels": 8,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
    }
    return diffusers.AutoencoderDC(**config | options)


def _flux2() -> nn.Module:
    return diffusers.AutoencoderKLFlux2(**_kl, decoder_block_out_channels=(8, 24), latent_channels=8)


def _hunyuan() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=64,
    )


def _kvae() -> nn.Module:
    return diffusers.AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2))


def _tiny() -> nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )


def _vq(**options: Any) -> nn.Module:
    """`norm_type="spatial"`: MoVQ's norms, modulated by the quantised latent."""
    return diffusers.VQModel(**_kl | options, num_vq_embeddings=32, latent_channels=4)


def _consistency() -> nn.Module:
    return diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 16),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 16),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    )


def _drawn(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    """The initial noise of the decoder's two steps."""
    return {"noise": [draw.normal(size.batch, 3, 2 * size.rows, 2 * size.cols) for _ in range(2)]}


def _rae(kind: str) -> nn.Module:
    return diffusers.AutoencoderRAE(
        encoder_type=kind,
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
        patch_size=4,
        encoder_input_size=64,
        latents_mean=[[[0.1]]] * 64,
        latents_std=[[[0.9]]] * 64,
    )


CASES: tuple[Case, ...] = (
    *halves("asymmetric", _asymmetric, Pictures(4), covers="AsymmetricAutoencoderKL", decode=_masked),
    *halves("dc", _dc, Pictures(8), covers="AutoencoderDC"),
    *halves(
        "dc_conv",
        lambda: _dc(downsample_block_type="conv", upsample_block_type="interpolate"),
        Pictures(8),
        covers="AutoencoderDC",
    ),
    *halves("vae_flux2", _flux2, Pictures(8), covers="AutoencoderKLFlux2"),
    *halves("vae_hunyuan_image", _hunyuan, Pictures(8), covers="AutoencoderKLHunyuanImage"),
    *halves("kvae", _kvae, Pictures(4), covers="AutoencoderKLKVAE"),
    *halves("vae_tiny", _tiny, Pictures(4), covers="AutoencoderTiny"),
    *halves("vq", _vq, Pictures(4), covers="VQModel"),
    *halves("movq", lambda: _vq(norm_type="spatial", block_out_channels=(32, 32)), Pictures(4), covers="VQModel"),
    *halves("consistency_decoder", _consistency, Pictures(4), covers="ConsistencyDecoderVAE", decode=_drawn),
    *halves("rae_dinov2", lambda: _rae("dinov2"), Pictures(64, space=4), covers="AutoencoderRAE", square=True),
    *halves("rae_mae", lambda: _rae("mae"), Pictures(64, space=4), covers="AutoencoderRAE", square=True),
)

LEFT_OUT: dict[str, str] = {}
