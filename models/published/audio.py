"""Denoisers of sound: `height` counts samples, of which one row of the latent has `scale`."""

from __future__ import annotations

import diffusers

from ..entry import Entry

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
)
