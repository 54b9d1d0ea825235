"""Denoisers of audio: `height` counts samples; one row of the latent has `scale` of them."""

from __future__ import annotations

import diffusers
import torch

from .entry import Entry

ENTRIES = (
    Entry(
        "stable-audio",
        "Stable Audio Open 1.0, 47 seconds",
        diffusers.StableAudioDiTModel,
        {},
        parameters=1_056_939_136,
        height=2097152,
        width=2048,
        multiple=2048,
        scale=2048,
    ),
    Entry(
        "ace-step-15-turbo",
        "ACE-Step 1.5 Turbo, one minute of music, guidance-distilled",
        diffusers.AceStepTransformer1DModel,
        {"is_turbo": True, "model_version": "turbo"},
        parameters=1_575_458_880,
        height=2880000,
        width=3840,
        batch=1,
        dtype=torch.bfloat16,
        multiple=3840,
        scale=1920,
    ),
)
