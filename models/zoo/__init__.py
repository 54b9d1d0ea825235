"""The zoo: a small configuration and inputs for every denoiser, ControlNet and autoencoder class of diffusers.

One file per family, each ending in `CASES` and in `LEFT_OUT`, which says of classes without a case why they have none.
"""

from __future__ import annotations

from ..case import Case
from ..small import cases as small_cases
from . import (
    audio,
    audio_autoencoders,
    autoencoders,
    controlnets,
    controlnets_tokens,
    images,
    images_tokens,
    kandinsky_videos,
    molecules,
    more_videos,
    packed_videos,
    unet_variants,
    unets,
    video_autoencoders,
    videos,
    wan_videos,
)
from .classes import available, kind_of, sources_of

__all__ = ["CASES", "FAMILIES", "LEFT_OUT", "kind_of", "sources_of", "zoo_case"]

FAMILIES = (
    unets,
    unet_variants,
    controlnets,
    controlnets_tokens,
    images,
    images_tokens,
    videos,
    wan_videos,
    more_videos,
    kandinsky_videos,
    packed_videos,
    molecules,
    audio,
    autoencoders,
    video_autoencoders,
    audio_autoencoders,
)

#: those that the installed diffusers has the classes for
CASES: tuple[Case, ...] = tuple(
    case for cases in (small_cases, *(family.CASES for family in FAMILIES)) for case in cases if available(case)
)

_CONDITION = "makes what a denoiser is conditioned on, once per picture; it is no denoiser"
LEFT_OUT: dict[str, str] = {name: reason for family in FAMILIES for name, reason in family.LEFT_OUT.items()} | {
    "AceStepAudioTokenDetokenizer": _CONDITION,
    "AceStepAudioTokenizer": _CONDITION,
    "AceStepConditionEncoder": _CONDITION,
    "AnimaTextConditioner": _CONDITION,
    "AudioLDM2ProjectionModel": _CONDITION,
    "CLIPImageProjection": _CONDITION,
    "Ideogram4PromptEnhancerHead": _CONDITION,
    "Kandinsky6SRLatentUpscalerBank": "scales a latent up between two denoisers, once; it is none itself",
    "MiniMaxMusic3ConditionEncoder": _CONDITION,
    "ReduxImageEncoder": _CONDITION,
    "StableAudio3DurationEmbedder": _CONDITION,
    "StableAudioProjectionModel": _CONDITION,
    "UniDiffuserTextDecoder": "writes text from an embedding, word by word; it is no denoiser",
}


def zoo_case(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: there is none.
    """
    return {each.name: each for each in CASES}[name]
