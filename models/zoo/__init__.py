"""The zoo: a small configuration and inputs for every denoiser, ControlNet and autoencoder class of diffusers.

One file per kind of model, each ending in `CASES` and in `LEFT_OUT` (the classes without a case, and why):

    unets, unets_variants                    UNets; the options of the configurable one
    images_grid, images_tokens               transformers of images: the latent as [B, C, H, W], or packed into tokens
    videos/                                  transformers of videos: one file per family (wan, ltx, hunyuan, …)
    controlnets_unets, …_transformers        ControlNets
    audio, molecules                         denoisers of sound and of molecules
    autoencoders_images, …_videos, …_audio   autoencoders, a case for each half (`autoencoder_halves`)

`classes` finds out which class of diffusers a case stands for.
"""

from __future__ import annotations

from ..case import Case
from ..small import cases as small_cases
from . import (
    audio,
    autoencoders_audio,
    autoencoders_images,
    autoencoders_videos,
    controlnets_transformers,
    controlnets_unets,
    images_grid,
    images_tokens,
    molecules,
    unets,
    unets_variants,
    videos,
)
from .classes import available, kind_of, sources_of

__all__ = ["CASES", "FAMILIES", "LEFT_OUT", "kind_of", "sources_of", "zoo_case"]

FAMILIES = (
    unets,
    unets_variants,
    controlnets_unets,
    controlnets_transformers,
    images_grid,
    images_tokens,
    *videos.FAMILIES,
    molecules,
    audio,
    autoencoders_images,
    autoencoders_videos,
    autoencoders_audio,
)

#: cases whose classes the installed diffusers has
CASES: tuple[Case, ...] = tuple(
    case for cases in (small_cases, *(family.CASES for family in FAMILIES)) for case in cases if available(case)
)

_CONDITION = "computes the condition of a denoiser, once per image; it is no denoiser"
LEFT_OUT: dict[str, str] = {name: reason for family in FAMILIES for name, reason in family.LEFT_OUT.items()} | {
    "AceStepAudioTokenDetokenizer": _CONDITION,
    "AceStepAudioTokenizer": _CONDITION,
    "AceStepConditionEncoder": _CONDITION,
    "AnimaTextConditioner": _CONDITION,
    "AudioLDM2ProjectionModel": _CONDITION,
    "CLIPImageProjection": _CONDITION,
    "Ideogram4PromptEnhancerHead": _CONDITION,
    "Kandinsky6SRLatentUpscalerBank": "scales a latent up between two denoisers, once; it is no denoiser",
    "MiniMaxMusic3ConditionEncoder": _CONDITION,
    "ReduxImageEncoder": _CONDITION,
    "StableAudio3DurationEmbedder": _CONDITION,
    "StableAudioProjectionModel": _CONDITION,
    "UniDiffuserTextDecoder": "generates text from an embedding, word by word; it is no denoiser",
}


def zoo_case(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: there is none.
    """
    return {each.name: each for each in CASES}[name]
