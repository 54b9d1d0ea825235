"""Pipelines of sound and music."""

from __future__ import annotations

from typing import Any

from ..pictures import embedding
from ..recipe import Part, Recipe, left_out

_mono: dict[str, Any] = {"in_channels": 1, "out_channels": 1}
_vocoder: dict[str, Any] = {
    "model_in_dim": 16, "sampling_rate": 16000, "upsample_initial_channel": 16, "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
    "initializer_range": 0.3,
}  # fmt: skip
_spoken = Recipe(
    {"unet": Part("audio_ldm"), "vae": _mono, "vocoder": _vocoder, "text_encoder": 20}, {"audio_length_in_s": 0.016}
)
_seconds: dict[str, Any] = {"text_encoder_dim": 12, "conditioning_dim": 12, "min_value": 0, "max_value": 64}

_third = Recipe(
    {"text_encoder": 12, "duration_embedder": {"output_dim": 12}, "transformer": {"global_cond_dim": 12}},
    {"duration": 0.1, "silence_padding_duration": 0.0},
)

RECIPES: dict[str, Recipe] = {
    "AudioLDMPipeline": _spoken,
    "LongCatAudioDiTPipeline": Recipe({"vae": {"latent_dim": 8, "encoder_latent_dim": 16}}),
    "AudioLDM2Pipeline": Recipe(
        {
            "vae": _mono,
            "vocoder": _vocoder,
            "text_encoder": 16,
            "text_encoder_2": 20,
            "language_model": 24,
            "projection_model": {"text_encoder_dim": 16, "text_encoder_1_dim": 20, "langauge_model_dim": 24},
        },
        {"audio_length_in_s": 0.016, "max_new_tokens": 4},
    ),
    "StableAudioPipeline": Recipe(
        {
            "text_encoder": 12,
            "projection_model": _seconds,
            "transformer": {"global_states_input_dim": 24, "sample_size": 64},
            "vae": {"sampling_rate": 64},
        },
        {"audio_end_in_s": 2.0},
    ),
    "MusicLDMPipeline": left_out("needs transformers 4: it reads the text features as one tensor"),
    "StableAudio3Pipeline": _third,
    "StableAudio3InpaintPipeline": _third
    | Recipe(call={"audio": lambda _: embedding(1, 2, 64), "mask_start_seconds": 0.0, "mask_end_seconds": 1.0}),
    "StableAudio3AudioToAudioPipeline": _third | Recipe(call={"audio": lambda _: embedding(1, 2, 64)}),
    "AceStepPipeline": Recipe(
        {
            "text_encoder": Part(kind="Qwen3Model", width=24),
            "condition_encoder": {
                "hidden_size": 24,
                "intermediate_size": 48,
                "text_hidden_dim": 24,
                "timbre_hidden_dim": 4,
                "num_lyric_encoder_hidden_layers": 1,
                "num_timbre_encoder_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 12,
            },
        },
        {"audio_duration": 0.1, "max_text_length": 64, "max_lyric_length": 32},
    ),
}
