"""Inputs of UNets and their ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .draw import Draw, Maker, Size


def _unet_2d(unet: diffusers.UNet2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "sample": draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321, dtype=torch.int64),
    }
    return inputs | _class_labels(unet, size, draw)


def _class_labels(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    kind, classes = unet.config.get("class_embed_type"), unet.config.get("num_class_embeds")
    if kind is None and classes is None:
        return {}
    if kind is None:
        return {"class_labels": draw.integers(classes, size.batch)}
    if kind == "timestep":
        return {"class_labels": draw.integers(1000, size.batch)}
    if kind in ("projection", "simple_projection"):
        return {"class_labels": draw.normal(size.batch, unet.config.projection_class_embeddings_input_dim)}
    raise ValueError(f"no example inputs are known for class_embed_type={kind!r}")


def _condition(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Inputs of all text-conditioned UNets besides the sample."""
    config = unet.config
    width = config.cross_attention_dim
    if config.get("encoder_hid_dim_type") == "image_proj":  # the only condition is the image's embedding
        return {
            "timestep": draw.full(321, dtype=torch.int64),
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": draw.normal(size.batch, config.encoder_hid_dim)},
        }
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise ValueError(f"no example inputs are known for encoder_hid_dim_type={config.encoder_hid_dim_type!r}")
    if config.get("encoder_hid_dim") is not None:
        width = config.encoder_hid_dim
    inputs: dict[str, Any] = {
        "timestep": draw.full(321, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(
            size.batch, size.tokens(77), width[0] if isinstance(width, (tuple, list)) else width
        ),
    }
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = draw.normal(size.batch, config.time_cond_proj_dim)
    addition = config.get("addition_embed_type")
    if addition == "text_time":
        height, width = size.rows * 8, size.cols * 8
        ids = torch.tensor([height, width, 0, 0, height, width]).to(draw.device, draw.dtype)
        if (
            config.projection_class_embeddings_input_dim
            == 5 * config.addition_time_embed_dim + config.cross_attention_dim
        ):
            ids = torch.tensor([height, width, 0, 0, 6]).to(draw.device, draw.dtype)  # 6: an aesthetic score
        pooled = config.projection_class_embeddings_input_dim - len(ids) * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw.normal(size.batch, pooled),
            "time_ids": ids.repeat(size.batch, 1),
        }
    elif addition not in (None, "text"):
        raise ValueError(f"no example inputs are known for addition_embed_type={addition!r}")
    return inputs | _class_labels(unet, size, draw)


def _unet_condition(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    sample = draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols)
    return {"sample": sample} | _condition(unet, size, draw)


def _unet_video(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    sample = draw.normal(size.batch, unet.config.in_channels, size.frames, size.rows, size.cols)
    return {"sample": sample} | _condition(unet, size, draw)


def _unet_motion(unet: diffusers.UNetMotionModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The text is repeated for every frame: `[B F, T, C]`."""
    inputs = _unet_video(unet, size, draw)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat_interleave(size.frames, dim=0)
    return inputs


def _controlnet(controlnet: diffusers.ControlNetModel, size: Size, draw: Draw) -> dict[str, Any]:
    scale = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    hint = draw.normal(size.batch, controlnet.config.conditioning_channels, size.rows * scale, size.cols * scale)
    return _unet_condition(controlnet, size, draw) | {"controlnet_cond": hint}


def _unet_spatio_temporal(unet: diffusers.UNetSpatioTemporalConditionModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The sample is noise and the first frame's latent, frames before channels; the only token is the image's."""
    config = unet.config
    ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
    return {
        "sample": draw.normal(size.batch, size.frames, config.in_channels, size.rows, size.cols),
        "timestep": draw.full(0.321),
        "encoder_hidden_states": draw.normal(size.batch, 1, config.cross_attention_dim),
        "added_time_ids": torch.tensor([6.0, 127.0, 0.02][:ids]).to(draw.device, draw.dtype).repeat(size.batch, 1),
    }


def _unet_i2vgen(unet: diffusers.I2VGenXLUNet, size: Size, draw: Draw) -> dict[str, Any]:
    config = unet.config
    latents = draw.normal(size.batch, config.in_channels, size.frames, size.rows, size.cols)
    return {
        "sample": latents,
        "timestep": draw.full(321, dtype=torch.int64),
        "fps": draw.full(16, size.batch, dtype=torch.int64),
        "image_latents": draw.normal(*latents.shape),
        "image_embeddings": draw.normal(size.batch, config.cross_attention_dim),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), config.cross_attention_dim),
    }


def _kandinsky3(unet: diffusers.Kandinsky3UNet, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(128)
    return {
        "sample": draw.normal(size.batch, unet.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, text, unet.config.encoder_hid_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
    }


def _stable_cascade(unet: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The prior's: text, pooled text and an image's embedding."""
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": draw.normal(size.batch, config.in_channels, size.rows, size.cols),
        "timestep_ratio": draw.full(0.321, size.batch),
        "clip_text_pooled": draw.normal(size.batch, 1, config.clip_text_pooled_in_channels),
    }
    if config.clip_text_in_channels is not None:
        inputs["clip_text"] = draw.normal(size.batch, size.tokens(77), config.clip_text_in_channels)
    if config.clip_image_in_channels is not None:
        inputs["clip_img"] = draw.normal(size.batch, 1, config.clip_image_in_channels)
    return inputs


MAKERS: dict[str, Maker] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_condition,
    "UNet3DConditionModel": _unet_video,
    "UNetMotionModel": _unet_motion,
    "UNetSpatioTemporalConditionModel": _unet_spatio_temporal,
    "I2VGenXLUNet": _unet_i2vgen,
    "Kandinsky3UNet": _kandinsky3,
    "StableCascadeUNet": _stable_cascade,
    "ControlNetModel": _controlnet,
}
