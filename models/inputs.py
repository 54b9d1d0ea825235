"""Example inputs of known architectures, derived from a module's own `config`: what its pipeline would pass.

`example_inputs` serves the catalog, the small zoo and folders on disk alike. Sizes are those of the latent; the
number of text tokens defaults to the pipeline's. Tensors take the device of the module's parameters and the narrowest
of their dtypes (some models keep a few in float32); under a fake tensor mode they are fake.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_3d_rotary_pos_embed
from torch import Tensor, nn

from . import inputs_pictures, inputs_tokens
from .draw import Draw, Maker, Size
from .wrappers import Decode, Encode


def example_inputs(
    module: nn.Module,
    rows: int,
    cols: int,
    *,
    batch: int = 1,
    frames: int = 1,
    text: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for one call of `module` on a `rows` x `cols` latent.

    Args:
        rows, cols: height and width of the latent (for pixel-space models, of the image).
        batch: samples per call, guidance branches counted.
        frames: latent frames, for video models.
        text: text tokens; the pipeline's usual number by default.
        seed: seed of the values.

    Raises:
        LookupError: no input recipe is known for the module's class.
        ValueError: the module's configuration asks for inputs that have no recipe.
    """
    maker = next((makers[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in makers), None)
    if maker is None:
        raise LookupError(
            f"no example inputs are known for {type(module).__name__}; give them yourself: "
            f"known are {', '.join(sorted(makers))}"
        )
    parameter = min((p for p in module.parameters() if p.is_floating_point()), key=lambda p: p.dtype.itemsize)
    draw = Draw(parameter.dtype, parameter.device, torch.Generator().manual_seed(seed))
    return maker(module, Size(rows, cols, batch, frames, text), draw)


def takes_inputs(module: nn.Module) -> bool:
    """Whether `example_inputs` has a recipe for the class of `module`."""
    return any(cls.__name__ in makers for cls in type(module).__mro__)


# ---------------------------------------------------------------------------------------------------- UNets


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
    """What all text-conditioned UNets take besides the sample."""
    config = unet.config
    width = config.cross_attention_dim
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
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        height, width = size.rows * 8, size.cols * 8
        ids = torch.tensor([height, width, 0, 0, height, width]).to(draw.device, draw.dtype)
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


# --------------------------------------------------------------------------------------------- transformers


def _image(transformer: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, transformer.config.in_channels, size.rows, size.cols)


def _dit(transformer: diffusers.DiTTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(transformer, size, draw),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "class_labels": draw.integers(transformer.config.num_embeds_ada_norm, size.batch),
    }


def _pixart(transformer: diffusers.PixArtTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        pixels = torch.tensor([8.0 * size.rows, 8.0 * size.cols]).to(draw.device, draw.dtype)
        added = {
            "resolution": pixels.repeat(size.batch, 1),
            "aspect_ratio": draw.full(size.rows / size.cols, size.batch, 1),
        }
    return {
        "hidden_states": _image(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "added_cond_kwargs": added,
    }


def _sd3(transformer: diffusers.SD3Transformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": _image(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77 + 256), config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
    }


def _flux(transformer: diffusers.FluxTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The latent is packed: 2 x 2 pixels of it are one token."""
    config = transformer.config
    rows, cols, text = size.rows // 2, size.cols // 2, size.tokens(512)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(cols).float())
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, rows * cols, config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
        "timestep": draw.full(0.321, size.batch),
        "img_ids": places.to(draw.device, draw.dtype),
        "txt_ids": draw.full(0, text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw.full(3.5, size.batch, dtype=torch.float32)
    return inputs


def _hunyuan_dit(transformer: diffusers.HunyuanDiT2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    rows, cols = size.rows // config.patch_size, size.cols // config.patch_size
    rotary = get_2d_rotary_pos_embed(
        config.attention_head_dim, ((0, 0), (rows, cols)), (rows, cols), device=draw.device, output_type="pt"
    )
    inputs: dict[str, Any] = {
        "hidden_states": _image(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": draw.mask(size.batch, config.text_len, torch.int64),
        "encoder_hidden_states_t5": draw.normal(size.batch, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": draw.mask(size.batch, config.text_len_t5, torch.int64),
        "image_rotary_emb": rotary,
    }
    if config.use_style_cond_and_image_meta_size:
        height, width = size.rows * 8, size.cols * 8
        meta = torch.tensor([height, width, height, width, 0, 0]).to(draw.device, draw.dtype)
        inputs["image_meta_size"] = meta.repeat(size.batch, 1)
        inputs["style"] = draw.full(0, size.batch, dtype=torch.int64)
    return inputs


def _sana(transformer: diffusers.SanaTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    inputs: dict[str, Any] = {
        "hidden_states": _image(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
        "timestep": draw.full(321.0, size.batch),
    }
    if transformer.config.guidance_embeds:
        inputs["guidance"] = draw.full(0.45, size.batch)
    return inputs


def _wan(transformer: diffusers.WanTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, config.in_channels, size.frames, size.rows, size.cols),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = draw.normal(size.batch, 257, config.image_dim)
    return inputs


def _cogvideox(transformer: diffusers.CogVideoXTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    text = size.tokens(config.max_text_seq_length)
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, size.frames, config.in_channels, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
    }
    if config.use_rotary_positional_embeddings:
        grid = (size.rows // config.patch_size, size.cols // config.patch_size)
        frames = size.frames // (config.patch_size_t or 1)
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, frames, device=draw.device
        )
    return inputs


# ----------------------------------------------------------------------------------------------------- VAEs


def _decode(decode: Decode, size: Size, draw: Draw) -> dict[str, Any]:
    return {"latent": draw.normal(size.batch, decode.vae.config.latent_channels, size.rows, size.cols)}


def _encode(encode: Encode, size: Size, draw: Draw) -> dict[str, Any]:
    config = encode.vae.config
    scale = 2 ** (len(config.block_out_channels) - 1)
    return {"sample": draw.normal(size.batch, config.in_channels, size.rows * scale, size.cols * scale)}


makers: dict[str, Maker] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_condition,
    "UNet3DConditionModel": _unet_video,
    "UNetMotionModel": _unet_motion,
    "ControlNetModel": _controlnet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "Decode": _decode,
    "Encode": _encode,
    **inputs_pictures.makers,
    **inputs_tokens.makers,
}
