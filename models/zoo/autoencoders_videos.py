"""Autoencoders of videos, one case per half, with several frames: each frame uses cached values of the one before."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ..case import Case
from ..inputs import Draw, Size
from ..wrappers import Decode
from .autoencoder_halves import Pictures, causal, halves

_wan: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
}


def _wan_vae(**options: Any) -> nn.Module:
    """`is_residual`: Wan 2.2, with average and repeat shortcuts around each resampling, on pixel patches."""
    return diffusers.AutoencoderKLWan(**_wan, **options)


def _wan22() -> nn.Module:
    return _wan_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=12)


def _qwen() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(**_wan)


def _qwen21() -> nn.Module:
    """One frame only: its causal convolutions are two-dimensional."""
    return diffusers.AutoencoderKLQwenImage21(**_wan, decoder_base_dim=12)


def _cogvideox() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16),  # pyright: ignore[reportArgumentType]
        down_block_types=("CogVideoXDownBlock3D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("CogVideoXUpBlock3D",) * 3,  # pyright: ignore[reportArgumentType]
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def _hunyuan() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16),  # pyright: ignore[reportArgumentType]
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )


def _hunyuan15() -> nn.Module:
    """One sample at a time: its mask does not support batches."""
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 32, 32),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        spatial_compression_ratio=4,
    )
    vae.enable_slicing()
    return vae


def _refiner() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1, spatial_compression_ratio=4
    )


_ltx: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("LTXVideoDownBlock3D",) * 3,
    "decoder_block_out_channels": (8, 16, 16),
    "layers_per_block": (1,) * 4,
    "decoder_layers_per_block": (1,) * 4,
    "spatio_temporal_scaling": (True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, False),
    "downsample_type": ("conv",) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (False,) * 3,
    "upsample_factor": (1,) * 3,
    "patch_size": 2,
}
_ltx095: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16),
    "decoder_block_out_channels": (8, 16),
    "layers_per_block": (1,) * 4,
    "decoder_layers_per_block": (1,) * 3,
    "spatio_temporal_scaling": (True, True, True),
    "decoder_spatio_temporal_scaling": (True, True),
    "downsample_type": ("spatial", "temporal", "spatiotemporal"),
    "decoder_inject_noise": (False, False, True),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "timestep_conditioning": True,
    "patch_size": 2,
}


def _ltx2() -> nn.Module:
    config: dict[str, Any] = _ltx095 | {"block_out_channels": (8, 16, 16)}
    return diffusers.AutoencoderKLLTX2Video(
        **config, down_block_types=("LTX2VideoDownBlock3D",) * 3, upsample_type=("spatiotemporal",) * 2
    )


def _timestep(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    """The timestep of the last denoising step, and the noise of the middle block's two convolutions."""
    noise = [draw.normal(size.rows, size.cols) for _ in range(2)]
    return {"temb": draw.full(0.05, size.batch), "noise": noise}


def _mochi() -> nn.Module:
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 64),  # pyright: ignore[reportArgumentType]
        decoder_block_out_channels=(32, 32, 64),  # pyright: ignore[reportArgumentType]
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1),
        temporal_expansions=(2, 3),
        spatial_expansions=(2, 2),
        add_attention_block=(False, True, True, True),
    )


def _cosmos() -> nn.Module:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 16, 16),
        decode_block_out_channels=(8, 8, 16, 16),
        attention_resolutions=(16,),
        resolution=64,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def _magvit() -> nn.Module:
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 16),
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.num_sample_frames_batch_size = 2  # for one latent frame: time is halved once
    return vae


def _kvae() -> nn.Module:
    return diffusers.AutoencoderKLKVAEVideo(
        ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, temporal_compress_times=2
    )


def _kandinsky() -> nn.Module:
    return diffusers.Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=1,
        temporal_compression_ratio=2,
    )


def _minimax() -> nn.Module:
    return diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        spatial_downsample_factors=(2, 2, 2, 1),
        temporal_downsample_factors=(1, 2, 2, 1),
        norm_num_groups=4,
        decoder_num_layers=2,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=8,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )


def _vidtok(**options: Any) -> nn.Module:
    return diffusers.AutoencoderVidTok(ch=8, ch_mult=[1, 2, 2, 2], num_res_blocks=1, **options)


def _allegro() -> nn.Module:
    """It only works on tiles, one sample at a time."""
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(8, 8, 16),
        temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.enable_tiling()
    vae.enable_slicing()
    vae.kernel, vae.stride = (8, 64, 64), (4, 32, 32)
    return vae


def _temporal_decoder() -> nn.Module:
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        block_out_channels=(32, 64),  # pyright: ignore[reportArgumentType]
    )


def _ltx2_diffusion() -> nn.Module:
    """Denoises pixels with neighbourhood attention; it has no encoder."""
    return Decode(
        diffusers.LTX2VideoDiffusionDecoderModel(
            latent_channels=4,
            patch_size=2,
            decoder_head_dim=8,
            decoder_stage_channels=(16, 8, 8),
            decoder_stage_depths=(1, 1, 1),
            decoder_stage_kernels=((3, 3, 3), (3, 5, 3)),
            decoder_upsample_strides=((1, 2, 2), (2, 1, 1)),
            decoder_upsample_channel_reductions=(2, 1),
            decoder_stage5_kernel=(3, 3, 3),
            decoder_t_emb_dim=8,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
        )
    )


def _pixels(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    noise = draw.normal(size.batch, 3, 2 * size.frames - 1, 4 * size.rows, 4 * size.cols)
    return {"latent": draw.normal(size.batch, 4, size.frames, size.rows, size.cols), "noise": [noise]}


def _frames(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    return {"num_frames": size.frames}


class _Flat(Pictures):
    """Frames of all samples in the batch dim."""

    def latent(self, size: Size) -> tuple[int, ...]:
        return size.batch * size.frames, self.channels, size.rows, size.cols


def _fours(space: int = 4, latent: int = 4, sample: int = 3, time: int = 4) -> Pictures:
    return Pictures(latent, sample, space, causal(time))


CASES: tuple[Case, ...] = (
    *halves("vae_wan", _wan_vae, _fours(), covers="AutoencoderKLWan", frames=3),
    *halves("vae_wan22", _wan22, _fours(8), covers="AutoencoderKLWan", frames=3),
    *halves("vae_qwen", _qwen, _fours(), covers="AutoencoderKLQwenImage", frames=3),
    *halves("vae_qwen21", _qwen21, _fours(sample=4), covers="AutoencoderKLQwenImage21"),
    *halves("vae_cogvideox", _cogvideox, _fours(), covers="AutoencoderKLCogVideoX", frames=5),
    *halves("vae_hunyuan_video", _hunyuan, _fours(), covers="AutoencoderKLHunyuanVideo", frames=3),
    *halves("vae_hunyuan_video15", _hunyuan15, _fours(), covers="AutoencoderKLHunyuanVideo15", frames=2),
    *halves("vae_hunyuan_refiner", _refiner, _fours(time=1), covers="AutoencoderKLHunyuanImageRefiner", frames=3),
    *halves(
        "vae_ltx",
        lambda: diffusers.AutoencoderKLLTXVideo(**_ltx),
        _fours(8, 8),
        covers="AutoencoderKLLTXVideo",
        frames=3,
    ),
    *halves(
        "vae_ltx095",
        lambda: diffusers.AutoencoderKLLTXVideo(**_ltx095, down_block_types=("LTXVideo095DownBlock3D",) * 3),
        _fours(8, 8),
        covers="AutoencoderKLLTXVideo",
        frames=3,
        decode=_timestep,
    ),
    *halves("vae_ltx2", _ltx2, _fours(8, 8), covers="AutoencoderKLLTX2Video", frames=3, decode=_timestep),
    Case(
        "ltx2_diffusion_decode",
        _ltx2_diffusion,
        text=None,
        maker=_pixels,
        covers="LTX2VideoDiffusionDecoderModel",
        frames=2,
    ),
    *halves("vae_mochi", _mochi, _fours(time=6), covers="AutoencoderKLMochi", frames=2),
    *halves("vae_cosmos", _cosmos, _fours(), covers="AutoencoderKLCosmos", frames=3),
    *halves("vae_magvit", _magvit, _fours(time=2), covers="AutoencoderKLMagvit", frames=3),
    *halves(
        "vae_allegro", _allegro, Pictures(4, 3, 4, lambda f: 4 * f), covers="AutoencoderKLAllegro", frames=3, multiple=8
    ),
    *halves(
        "vae_temporal_decoder",
        _temporal_decoder,
        _Flat(4),
        covers="AutoencoderKLTemporalDecoder",
        frames=3,
        decode=_frames,
    ),
    *halves("kvae_video", _kvae, _fours(2, time=2), covers="AutoencoderKLKVAEVideo", frames=10),
    *halves("kandinsky_sr", _kandinsky, _fours(time=2), covers="Kandinsky6SRVAE", frames=10),
    *halves("vae_minimax", _minimax, Pictures(4, 3, 8, lambda f: 22), covers="AutoencoderKLMiniMaxH3", frames=7),
    *halves("vidtok", _vidtok, Pictures(4, 3, 8, lambda f: 4 * f), covers="AutoencoderVidTok", frames=3),
    *halves(
        "vidtok_fsq",
        lambda: _vidtok(regularizer="fsq", double_z=False, codebook_size=4096),
        Pictures(4, 3, 8, lambda f: 4 * f),
        covers="AutoencoderVidTok",
        frames=3,
    ),
)

LEFT_OUT: dict[str, str] = {}
