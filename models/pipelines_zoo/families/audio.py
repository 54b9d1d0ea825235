"""Pipelines of sound and music."""

from __future__ import annotations

from typing import Any

from ..recipe import Part, Recipe

_mono: dict[str, Any] = {"in_channels": 1, "out_channels": 1}
_vocoder: dict[str, Any] = {
    "model_in_dim": 16, "sampling_rate": 16000, "upsample_initial_channel": 16, "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
}  # fmt: skip
_spoken = Recipe(
    {"unet": Part("audio_ldm"), "vae": _mono, "vocoder": _vocoder, "text_encoder": 20}, {"audio_length_in_s": 0.016}
)
_seconds: dict[str, Any] = {"text_encoder_dim": 12, "conditioning_dim": 12, "min_value": 0, "max_value": 64}
_encoder_only = Part(width=12, options={"is_encoder_decoder": False})

RECIPES: dict[str, Recipe] = {
    "AudioLDMPipeline": _spoken,
    "MusicLDMPipeline": _spoken,
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
    **{
        f"StableAudio3{kind}Pipeline": Recipe({"text_encoder": _encoder_only})
        for kind in ("", "Inpaint", "AudioToAudio")
    },
}
