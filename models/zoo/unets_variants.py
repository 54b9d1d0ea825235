"""Options of `UNet2DConditionModel`: kinds of blocks and conditions, and features added from outside."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import nn

from ..case import Case
from ..inputs import Draw, Size

_down = ("CrossAttnDownBlock2D", "DownBlock2D")
_up = ("UpBlock2D", "CrossAttnUpBlock2D")
_simple_down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
_simple_up = ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")


def _unet(down: tuple[str, ...] = _down, up: tuple[str, ...] = _up, **options: Any) -> Any:
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**config | options, down_block_types=down, up_block_types=up)


def _simple(**options: Any) -> Any:
    """Residual blocks that resample, and joint attention to text and pixels."""
    return _unet(
        _simple_down,
        _simple_up,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        **options,
    )


def _upscaler() -> nn.Module:
    """K-blocks: adaptive group norms, resampling with FIR filters, no middle block."""
    return _unet(
        ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        attention_head_dim=16,
        mid_block_type=None,
        in_channels=8,
        out_channels=5,
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=20,
        norm_num_groups=None,
    )


def _deep_floyd() -> nn.Module:
    return _simple(
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        cross_attention_dim=32,
        encoder_hid_dim=20,
        encoder_hid_dim_type="text_proj",
        time_embedding_act_fn="gelu",
        act_fn="gelu",
        in_channels=3,
        out_channels=6,
    )


def _deep_floyd_upscaler() -> nn.Module:
    return _simple(
        class_embed_type="timestep",
        only_cross_attention=True,
        mid_block_only_cross_attention=False,
        cross_attention_norm="group_norm",
        cross_attention_dim=32,
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
        in_channels=6,
        out_channels=6,
    )


def _kandinsky(kind: str) -> nn.Module:
    joint = "text_image_proj" if kind == "text_image" else "image_proj"
    return _simple(
        addition_embed_type=kind,
        encoder_hid_dim=24,
        encoder_hid_dim_type=joint,
        in_channels=4 if kind != "image_hint" else 8,
        out_channels=8,
    )


def _picture_embeds(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    kind = unet.config.addition_embed_type
    added: dict[str, Any] = {"image_embeds": draw.normal(size.batch, 24)}
    if kind == "text_image":
        added["text_embeds"] = draw.normal(size.batch, 24)
    if kind == "image_hint":
        added["hint"] = draw.normal(size.batch, 3, size.rows * 8, size.cols * 8)
    text = draw.normal(size.batch, size.tokens(77), 24)
    hint = {"image_hint": 4}.get(kind, 0)  # the model concatenates the hint with the sample
    return {
        "sample": draw.normal(size.batch, unet.config.in_channels - hint, size.rows, size.cols),
        "timestep": draw.full(321.0),
        "encoder_hidden_states": text if kind == "text_image" else None,
        "added_cond_kwargs": added,
    }


def _gligen() -> nn.Module:
    return _unet(attention_type="gated", use_linear_projection=True)


def _boxes(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Phrases with their boxes; the last slot is empty."""
    places = 4
    boxes = draw.normal(size.batch, places, 4).sigmoid()
    masks = torch.ones(size.batch, places).to(boxes)
    masks[:, -1] = 0
    phrases = draw.normal(size.batch, places, unet.config.cross_attention_dim)
    gligen = {"boxes": boxes, "positive_embeddings": phrases, "masks": masks}
    return {"cross_attention_kwargs": {"gligen": gligen}}


def _ip_adapter() -> nn.Module:
    """Cross-attention to two images beside the text, with separate weights."""
    unet = _unet()
    processors: dict[str, Any] = {}
    for name, processor in unet.attn_processors.items():
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = processor
        if "attn2" in name:
            processors[name] = IPAdapterAttnProcessor2_0(attention.out_dim, 24, num_tokens=(4,), scale=0.7)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(20, 24, 4)])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return unet


def _two_pictures(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321.0),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), unet.config.cross_attention_dim),
        "added_cond_kwargs": {"image_embeds": [draw.normal(size.batch, 2, 20)]},
    }


def _t2i_adapted(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Features of a T2I-Adapter for each level."""
    levels = enumerate(unet.config.block_out_channels)
    shapes = [(channels, size.rows >> level, size.cols >> level) for level, channels in levels]
    return {"down_intrablock_additional_residuals": [draw.normal(size.batch, *shape) for shape in shapes]}


def _free_u() -> nn.Module:
    unet = _unet(block_out_channels=(16, 16), norm_num_groups=4)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return unet


def _masks(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"encoder_attention_mask": draw.mask(size.batch, size.tokens(77))}


def _audio_ldm() -> nn.Module:
    """The text is a class embedding, concatenated to the timestep's; no cross-attention."""
    return _unet(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=20,
        class_embeddings_concat=True,
        cross_attention_dim=(16, 32),
    )


def _sound(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321.0),
        "encoder_hidden_states": None,
        "class_labels": draw.normal(size.batch, 20),
    }


def _adapter(kind: str) -> nn.Module:
    return diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=4, adapter_type=kind)


def _hint(adapter: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(size.batch, 3, size.rows * 4, size.cols * 4)}


def _hints(adapter: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"xs": [draw.normal(size.batch, 3, size.rows * 4, size.cols * 4) for _ in range(2)]}


CASES: tuple[Case, ...] = (
    Case("unet_upscaler", _upscaler, multiple=4),
    Case("deep_floyd", _deep_floyd, multiple=2),
    Case("deep_floyd_upscaler", _deep_floyd_upscaler, multiple=2),
    Case("kandinsky_21", lambda: _kandinsky("text_image"), multiple=2, maker=_picture_embeds),
    Case("kandinsky_22", lambda: _kandinsky("image"), multiple=2, maker=_picture_embeds),
    Case("kandinsky_22_hint", lambda: _kandinsky("image_hint"), multiple=2, maker=_picture_embeds),
    Case("unet_gligen", _gligen, extra=_boxes),
    Case("unet_ip_adapter", _ip_adapter, maker=_two_pictures),
    Case("unet_t2i_adapted", _unet, extra=_t2i_adapted),
    Case("unet_free_u", _free_u, multiple=2),
    Case("unet_masked_text", lambda: _unet(time_cond_proj_dim=20), extra=_masks),
    Case("unet_unclip", lambda: _unet(class_embed_type="projection", projection_class_embeddings_input_dim=20)),
    Case("audio_ldm", _audio_ldm, maker=_sound),
    Case("t2i_adapter", lambda: _adapter("full_adapter"), multiple=2, maker=_hint),
    Case("t2i_adapter_light", lambda: _adapter("light_adapter"), multiple=2, maker=_hint),
    Case(
        "t2i_adapters",
        lambda: diffusers.MultiAdapter([_adapter("full_adapter"), _adapter("full_adapter")]),  # type: ignore[list-item]
        multiple=2,
        maker=_hints,
    ),
)

LEFT_OUT: dict[str, str] = {}
