"""Tiny encoders of texts and pictures from transformers, of a given width."""

from __future__ import annotations

from typing import Any

import diffusers  # noqa: F401 - first, so that transformers' lazy classes resolve as they do in pipelines
import transformers

from .tokenizers import VOCABULARY

PICTURE = 32  #: pixels per side that image encoders take
PATCH = 8  #: pixels per side of their patches

_ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _stack(width: int, layers: int = 2) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }


def _decoder(width: int) -> dict[str, Any]:
    """Llama's kind: rotary positions, grouped keys and values."""
    return _stack(width) | _ends | {
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 4096,
    }  # fmt: skip


def _clip_text(width: int) -> dict[str, Any]:
    return _stack(width) | {
        "vocab_size": VOCABULARY,
        "projection_dim": width,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": 188,
        "eos_token_id": 189,
        "pad_token_id": 189,
    }


def _t5(width: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def _vision(width: int) -> dict[str, Any]:
    return _stack(width) | {"image_size": PICTURE, "patch_size": PATCH, "projection_dim": width}


def _bert(width: int) -> dict[str, Any]:
    return _stack(width) | {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "type_vocab_size": 2}


def _rotary_in_three(width: int) -> dict[str, Any]:
    """Rotary positions of time, rows and columns (Qwen's models of pictures and text)."""
    half = width // 4
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rotary = {"rope_type": "default", "type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    return {"rope_parameters": rotary | {"mrope_interleaved": True}, "rope_scaling": rotary}


_marks: dict[str, Any] = {
    "image_token_id": 262,
    "video_token_id": 263,
    "vision_start_token_id": 260,
    "vision_end_token_id": 261,
}


def _qwen_vl(width: int) -> dict[str, Any]:
    text = _decoder(width) | _rotary_in_three(width)
    vision = {
        "depth": 2,
        "hidden_size": width,
        "embed_dim": width,
        "intermediate_size": 2 * width,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    if "embed_dim" in vision:
        vision["mlp_ratio"] = 2
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False, **_marks}


def _qwen_2_vl(width: int) -> dict[str, Any]:
    config = _qwen_vl(width)
    return config | {"vision_config": config["vision_config"] | {"hidden_size": width}}


def _qwen_3_vl(width: int) -> dict[str, Any]:
    vision = _qwen_vl(width)["vision_config"] | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen_vl(width) | {"vision_config": vision}


def _gemma_3(width: int) -> dict[str, Any]:
    text = _decoder(width) | {"sliding_window": 16, "query_pre_attn_scalar": 8}
    return {"text_config": text, "vision_config": _vision(width), "mm_tokens_per_image": 4}


def _with_vision(width: int) -> dict[str, Any]:
    return {"text_config": _decoder(width) | {"model_type": "llama"}, "vision_config": _vision(width)}


def _mistral_3(width: int) -> dict[str, Any]:
    vision = _stack(width) | {"model_type": "pixtral", "image_size": PICTURE, "patch_size": PATCH, "head_dim": 8}
    text = _decoder(width) | {"model_type": "mistral"}
    return {"text_config": text, "vision_config": vision, "image_token_index": 258}


def _clap(width: int) -> dict[str, Any]:
    text = _bert(width) | {"projection_dim": width, "projection_hidden_size": width, "pad_token_id": 1}
    audio = {
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 64,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "projection_dim": width,
    }
    return {"text_config": text, "audio_config": audio, "projection_dim": width}


def _t5_gemma(width: int) -> dict[str, Any]:
    module = _decoder(width) | {"query_pre_attn_scalar": 8, "sliding_window": 16, "dropout_rate": 0.0}
    return {"encoder": module, "decoder": module, "is_encoder_decoder": False, "vocab_size": VOCABULARY}


def _t5_gemma_2(width: int) -> dict[str, Any]:
    return _gemma_3(width) | {"text_config": _gemma_3(width)["text_config"] | {"dropout_rate": 0.0}}


_CONFIGS: dict[str, Any] = {
    "t5gemma": _t5_gemma,
    "t5gemma2_encoder": _t5_gemma_2,
    "clip_text_model": _clip_text,
    "clip_vision_model": _vision,
    "siglip_vision_model": _vision,
    "siglip2_vision_model": lambda width: _stack(width) | {"patch_size": PATCH, "num_patches": 16},
    "t5": _t5,
    "umt5": _t5,
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": lambda width: _bert(width) | {"project_dim": width, "pad_token_id": 1},
    "clap_text_model": lambda width: _clap(width)["text_config"],
    "clap": _clap,
    "gpt2": lambda width: {"n_embd": width, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64},
    "qwen2_vl": _qwen_2_vl,
    "qwen2_5_vl": _qwen_vl,
    "qwen2_5_vl_text": lambda width: _decoder(width) | _rotary_in_three(width),
    "qwen3_vl": _qwen_3_vl,
    "gemma3": _gemma_3,
    "llava": _with_vision,
    "mistral3": _mistral_3,
}


def encoder(kind: Any, width: int, **options: Any) -> Any:
    """A randomly initialised encoder of a class of transformers, `width` channels wide, in eval mode.

    Args:
        options: entries of its configuration; those of nested ones as `{"text_config": {...}}`.
    """
    config_class = kind.config_class
    if kind.__name__ == "T5GemmaEncoder":
        return kind(transformers.T5GemmaModuleConfig(**_t5_gemma(width)["encoder"])).eval().requires_grad_(False)
    config = _CONFIGS.get(config_class.model_type, _decoder)(width)
    for key, value in options.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    return kind(config_class(**config)).eval().requires_grad_(False)


def causal(name: str, width: int, **options: Any) -> Any:
    """The encoder of a class of transformers by name, for pipelines that take any model."""
    return encoder(getattr(transformers, name), width, **options)
