"""Transformers of images that take the latent as a grid, `[B, C, H, W]`; `images_tokens` has those that take tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from torch import nn

from ..case import Case
from ..inputs import Draw, Size
from ..small import sd3


def _aura_flow() -> nn.Module:
    module = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
    )
    for name, layer in module.named_modules():
        if ".attn." in name and isinstance(layer, nn.Linear):
            layer.weight.data *= 4  # else attention hardly affects the output
    return module


def _bria_fibo_2() -> nn.Module:
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(0, 2),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=1,
        gist_min_text_len=2,
        gist_max_text_len=7,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 64, 64),
    )


def _context_latents(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"context_latents": [draw.normal(size.batch, transformer.config.in_channels, size.rows, size.cols)]}


def _cogview(**options: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 24,
        "time_embed_dim": 16,
        "condition_dim": 8,
    } | options


def _text_mask(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"attention_mask": draw.mask(size.batch, size.tokens(224))}


def _ernie() -> nn.Module:
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    )


def _glm() -> nn.Module:
    return diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )


def _prior_dropped(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    places = (size.rows // transformer.config.patch_size) * (size.cols // transformer.config.patch_size)
    return {"prior_token_drop": draw.full(True, size.batch, places, dtype=torch.bool)}


def _hidream() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[24, 20],
        text_emb_dim=16,
        axes_dims_rope=(4, 6, 6),  # pyright: ignore[reportArgumentType]
        max_resolution=(50, 50),
        llama_layers=[0, 1, 1, 2],
    )


def _hunyuan_image(**options: Any) -> nn.Module:
    config: dict[str, Any] = {"patch_size": (1, 1), "rope_axes_dim": (8, 8)} | options
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        text_embed_dim=24,
        **config,
    )


def _joy(**options: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 24,
        "num_layers": 2,
        "rope_dim_list": [4, 6, 6],
    } | options


def _lumina() -> nn.Module:
    return diffusers.LuminaNextDiT2DModel(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    )


def _lumina_2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 64, 64),
        cap_feat_dim=24,
    )


def _omnigen() -> nn.Module:
    return diffusers.OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        num_layers=2,
        pad_token_id=0,
        vocab_size=20,
        rope_scaling={"long_factor": [1.0, 1.1, 1.2, 1.3], "short_factor": [1.0, 1.0, 1.0, 1.0]},
        pos_embed_max_size=64,
        time_step_dim=16,
    )


def _pictures_in_text(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each sample's text contains an image of 4 x 4 latent pixels, which replaces four of its tokens."""
    pictures = [draw.normal(1, transformer.config.in_channels, 4, 4) for _ in range(size.batch)]
    last = size.tokens(64)
    return {"input_img_latents": pictures, "input_image_sizes": {b: [[last - 4, last]] for b in range(size.batch)}}


def _prior() -> nn.Module:
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=24, num_embeddings=12
    )


def _prx() -> nn.Module:
    return diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8], resolution_embeds=True
    )


def _z_image(**options: Any) -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
        **options,
    )


def _control_of_sequences(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """ControlNet residuals for the joint sequence after a layer; its parts are padded to multiples of 32."""
    places = (size.rows // 2) * (size.cols // 2)
    length = -(-places // 32) * 32 + -(-size.tokens(128) // 32) * 32
    return {"controlnet_block_samples": {1: draw.normal(size.batch, length, transformer.config.dim)}}


def _with_reference(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """A clean image to edit before the noisy one; also as features of a vision encoder, and inside the text."""
    config, batch = transformer.config, range(size.batch)

    def texts() -> list[Any]:
        return [draw.normal(size.tokens(128) + i, config.cap_feat_dim) for i in range(3)]

    return {
        "x": [[draw.normal(config.in_channels, 1, size.rows, size.cols) for _ in range(2)] for _ in batch],
        "cap_feats": [texts() for _ in batch],
        "siglip_feats": [[draw.normal(4, 4, config.siglip_feat_dim), None] for _ in batch],
        "image_noise_mask": [[0, 1] for _ in batch],
    }


def _control_of_blocks(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Residuals of an SD3 ControlNet after the blocks."""
    config = transformer.config
    tokens = (size.rows // config.patch_size) * (size.cols // config.patch_size)
    return {
        "block_controlnet_hidden_states": [
            draw.normal(size.batch, tokens, config.num_attention_heads * config.attention_head_dim) for _ in range(2)
        ]
    }


def _skipped(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"skip_layers": [0]}


# ---------------------------------------------------------------------- the transformer inside UNets, on its own

_block: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
}


def _block_inputs(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    channels, text = transformer.config.in_channels, size.tokens(77)
    return {
        "hidden_states": draw.normal(size.batch, channels, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.cross_attention_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
    }


def _dual_inputs(dual: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(size.batch, 8, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, sum(dual.condition_lengths), 24),
    }


def _patched_inputs(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(size.batch, transformer.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(7, size.batch, dtype=torch.int64),
        "class_labels": draw.integers(transformer.config.num_embeds_ada_norm, size.batch),
    }


def _vectorised_inputs(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The latent holds codebook indices: there is no floating-point image to cut."""
    return {
        "hidden_states": draw.integers(transformer.config.num_vector_embeds, size.batch, size.rows * size.cols),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), transformer.config.cross_attention_dim),
        "timestep": draw.full(7, dtype=torch.int64),
    }


def _patched() -> nn.Module:
    return diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=4,
        sample_size=16,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
    )


def _vectorised() -> nn.Module:
    return diffusers.Transformer2DModel(
        **_block, sample_size=64, num_vector_embeds=12, num_embeds_ada_norm=10, norm_type="ada_norm"
    )


CASES: tuple[Case, ...] = (
    Case("sd3_controlled", sd3, multiple=2, extra=_control_of_blocks),
    Case("sd3_skipped", sd3, multiple=2, extra=_skipped),
    Case("aura_flow", _aura_flow, multiple=2),
    Case("lumina_next", _lumina, multiple=2),
    Case("lumina_2", _lumina_2, multiple=2),
    Case("z_image", _z_image, multiple=2),
    Case("z_image_controlled", _z_image, multiple=2, extra=_control_of_sequences),
    Case("z_image_omni", lambda: _z_image(siglip_feat_dim=20), multiple=2, extra=_with_reference),
    Case("cogview3_plus", lambda: diffusers.CogView3PlusTransformer2DModel(**_cogview()), multiple=2),
    Case("cogview4", lambda: diffusers.CogView4Transformer2DModel(**_cogview(rope_axes_dim=(64, 64))), multiple=2),
    Case(
        "cogview4_masked",
        lambda: diffusers.CogView4Transformer2DModel(**_cogview(rope_axes_dim=(64, 64))),
        multiple=2,
        extra=_text_mask,
    ),
    Case("hidream", _hidream, multiple=2, square=True),
    Case("hidream_oblong", _hidream, multiple=2),
    Case("hunyuan_image", lambda: _hunyuan_image(text_embed_2_dim=20, guidance_embeds=True, use_meanflow=True)),
    Case("hunyuan_image_refiner", lambda: _hunyuan_image(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6))),
    Case("omnigen", _omnigen, multiple=2),
    Case("omnigen_edit", _omnigen, multiple=2, extra=_pictures_in_text),
    Case("prx", _prx, multiple=2),
    Case("glm_image", _glm, multiple=2),
    Case("glm_image_dropped", _glm, multiple=2, extra=_prior_dropped),
    Case("ernie_image", _ernie),
    Case("joy_image_edit", lambda: diffusers.JoyImageEditTransformer3DModel(**_joy()), multiple=2),
    Case(
        "joy_image_edit_mrope", lambda: diffusers.JoyImageEditTransformer3DModel(**_joy(rope_type="mrope")), multiple=2
    ),
    Case("joy_image_edit_plus", lambda: diffusers.JoyImageEditPlusTransformer3DModel(**_joy()), multiple=2),
    Case("bria_fibo_2", _bria_fibo_2, multiple=2),
    Case("bria_fibo_2_edit", _bria_fibo_2, multiple=2, extra=_context_latents),
    Case("prior", _prior),
    Case("transformer_2d", lambda: diffusers.Transformer2DModel(**_block, in_channels=8), maker=_block_inputs),
    Case("transformer_2d_patched", _patched, multiple=2, square=True, maker=_patched_inputs),
    Case("transformer_2d_vectorised", _vectorised, maker=_vectorised_inputs),
    Case("dual_transformer_2d", lambda: DualTransformer2DModel(**_block, in_channels=8), maker=_dual_inputs),
    Case("dreamlite", lambda: diffusers.DreamLiteTransformer2DModel(**_block, in_channels=8), maker=_block_inputs),
)

LEFT_OUT: dict[str, str] = {}
