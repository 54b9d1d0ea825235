"""UNets and other denoisers that are no transformers: at least one case of each class."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ..case import Case
from ..inputs import Draw, Size

_two: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def _unet_1d() -> nn.Module:
    """Dance Diffusion (audio): cubic resampling, attention at the lowest level, Fourier features of the timestep."""
    return diffusers.UNet1DModel(
        block_out_channels=(16, 64, 64), extra_in_channels=32, sample_size=32, use_timestep_embedding=False
    )


def _unet_1d_resnet(**options: Any) -> nn.Module:
    """Diffuser (trajectories): convolutions of length 5 with group norms."""
    config: dict[str, Any] = {
        "in_channels": 6,
        "out_channels": 6,
        "block_out_channels": (8, 16),
        "time_embedding_type": "positional",
        "use_timestep_embedding": True,
        "down_block_types": ("DownResnetBlock1D",) * 2,
        "up_block_types": ("UpResnetBlock1D",),
        "mid_block_type": "MidResTemporalBlock1D",
        "out_block_type": "OutConv1DBlock",
        "act_fn": "swish",
        "flip_sin_to_cos": False,
        "freq_shift": 1.0,
    }
    return diffusers.UNet1DModel(**config | options)


def _value_function() -> nn.Module:
    """Diffuser's value function: halves a trajectory until one number is left."""
    return _unet_1d_resnet(
        up_block_types=(),
        mid_block_type="ValueFunctionMidBlock1D",
        out_block_type="ValueFunction",
        downsample_each_block=True,
        down_block_types=("DownResnetBlock1D",) * 3,
        block_out_channels=(16, 16, 32),
    )


def _trajectory(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"sample": draw.normal(size.batch, unet.config.in_channels, size.rows), "timestep": draw.full(321.0)}


def _unet_2d_skip() -> nn.Module:
    """NCSN++: an image beside the features at each level, resampled with FIR filters; noise levels as timesteps."""
    return diffusers.UNet2DModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        time_embedding_type="fourier",
        freq_shift=0,
        flip_sin_to_cos=True,
        act_fn="silu",
        mid_block_scale_factor=1.4,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=None,  # pyright: ignore[reportArgumentType]
        norm_eps=1e-6,
        attention_head_dim=16,
    )


def _noise_level(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"timestep": draw.full(0.9, size.batch)}


def _i2vgen() -> nn.Module:
    return diffusers.I2VGenXLUNet(
        **_two,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        num_attention_heads=None,
    )


def _picture_to_video(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    width = unet.config.cross_attention_dim
    shape = (size.batch, unet.config.in_channels, size.frames, size.rows, size.cols)
    return {
        "sample": draw.normal(*shape),
        "timestep": draw.full(321.0),
        "fps": draw.full(8.0, size.batch),
        "image_latents": draw.normal(*shape),
        "image_embeddings": draw.normal(size.batch, width),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), width),
    }


def _svd() -> nn.Module:
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )


def _stable_video(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.normal(size.batch, size.frames, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321.0),
        "encoder_hidden_states": draw.normal(size.batch, 1, unet.config.cross_attention_dim),
        "added_time_ids": draw.normal(size.batch, 3),
    }


def _kandinsky_3() -> nn.Module:
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        encoder_hid_dim=24,
    )


def _masked_text(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(128)
    return {
        "sample": draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, unet.config.encoder_hid_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
    }


_cascade: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "num_attention_heads": (2, 4),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "timestep_ratio_embedding_dim": 16,
    "conditioning_dim": 24,
    "clip_text_pooled_in_channels": 24,
}


def _cascade_prior() -> nn.Module:
    return diffusers.StableCascadeUNet(
        **_cascade, clip_text_in_channels=20, clip_image_in_channels=12, switch_level=(False,)
    )


def _cascade_decoder() -> nn.Module:
    """Patches of four, an upscaled smaller latent, and no attention at the highest level."""
    types = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    return diffusers.StableCascadeUNet(
        **_cascade | {"num_attention_heads": (0, 4)},
        patch_size=2,
        block_types_per_layer=(types, (*types, "SDCascadeAttnBlock")),
        down_blocks_repeat_mappers=(1, 2),
        up_blocks_repeat_mappers=(2, 1),
        effnet_in_channels=6,
        timestep_conditioning_type=("sca",),
    )


def _clip(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": draw.normal(size.batch, config.in_channels, size.rows, size.cols),
        "timestep_ratio": draw.full(0.321, size.batch),
        "clip_text_pooled": draw.normal(size.batch, 1, config.clip_text_pooled_in_channels),
    }
    if config.clip_text_in_channels is not None:
        inputs["clip_text"] = draw.normal(size.batch, size.tokens(77), config.clip_text_in_channels)
        inputs["clip_img"] = draw.normal(size.batch, 1, config.clip_image_in_channels)
    if config.effnet_in_channels is not None:
        inputs["effnet"] = draw.normal(size.batch, config.effnet_in_channels, size.rows // 4, size.cols // 4)
    return inputs


def _uvit(**options: Any) -> nn.Module:
    return diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=24,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=24,
        vocab_size=40,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=32,
        **options,
    )


def _codes(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = unet.config
    return {
        "input_ids": draw.integers(config.vocab_size, size.batch, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), config.encoder_hidden_size),
        "pooled_text_emb": draw.normal(size.batch, config.cond_embed_dim),
        "micro_conds": draw.normal(size.batch, 5),
    }


def _dream_lite() -> nn.Module:
    return diffusers.DreamLiteUNetModel(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=8,
        use_linear_projection=True,
    )


def _audio_ldm_2() -> nn.Module:
    """Two texts: each level attends to one, then to the other."""
    return diffusers.AudioLDM2UNet2DConditionModel(
        **_two,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # pyright: ignore[reportArgumentType]
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=([None, 24, 20], [None, 24, 20]),  # type: ignore[arg-type]
        attention_head_dim=4,
    )


def _two_texts(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text, first, second = size.tokens(8), *unet.config.cross_attention_dim[0][1:]
    return {
        "sample": draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321.0),
        "encoder_hidden_states": draw.normal(size.batch, text, first),
        "encoder_hidden_states_1": draw.normal(size.batch, text + 2, second),
        "encoder_attention_mask_1": draw.mask(size.batch, text + 2),
    }


def _unidiffuser() -> nn.Module:
    """Image, text and an image embedding in one sequence, in transformer blocks with skip connections."""
    return diffusers.UniDiffuserModel(
        text_dim=16,
        clip_img_dim=12,
        num_text_tokens=7,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        norm_num_groups=8,
        sample_size=32,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        norm_type="layer_norm",
        block_type="unidiffuser",
        use_timestep_embedding=False,
        use_data_type_embedding=True,
        ff_final_dropout=True,
        use_patch_pos_embed=False,
    )


def _joint(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = unet.config
    return {
        "latent_image_embeds": draw.normal(size.batch, config.in_channels, size.rows, size.cols),
        "image_embeds": draw.normal(size.batch, 1, config.clip_img_dim),
        "prompt_embeds": draw.normal(size.batch, config.num_text_tokens, config.text_dim),
        "timestep_img": draw.full(321.0),
        "timestep_text": draw.full(123.0),
        "data_type": draw.full(1, dtype=unet.data_type_pos_embed_token.dtype).long(),
    }


CASES: tuple[Case, ...] = (
    Case("unet_1d", _unet_1d, multiple=8, maker=_trajectory),
    Case("unet_1d_resnet", _unet_1d_resnet, multiple=4, maker=_trajectory),
    Case("unet_1d_value", _value_function, multiple=32, square=True, maker=_trajectory),
    Case("unet_2d_skip", _unet_2d_skip, multiple=4, extra=_noise_level),
    Case("i2vgen", _i2vgen, multiple=8, frames=3, maker=_picture_to_video),
    Case("stable_video", _svd, frames=3, text=None, maker=_stable_video),
    Case("kandinsky_3", _kandinsky_3, multiple=2, maker=_masked_text),
    Case("cascade_prior", _cascade_prior, multiple=2, maker=_clip),
    Case("cascade_decoder", _cascade_decoder, multiple=4, maker=_clip),
    Case("uvit", _uvit, maker=_codes),
    Case("uvit_resampled", lambda: _uvit(downsample=True, upsample=True), multiple=2, maker=_codes),
    Case("dream_lite", _dream_lite, multiple=4),
    Case("audio_ldm_2", _audio_ldm_2, maker=_two_texts),
    Case("unidiffuser", _unidiffuser, multiple=32, square=True, maker=_joint),
)

LEFT_OUT: dict[str, str] = {
    "MotionAdapter": "weights for UNetMotionModel, whose case has them; not callable by itself",
}
