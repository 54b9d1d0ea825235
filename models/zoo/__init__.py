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
    images,
    images_tokens,
    more_videos,
    packed_videos,
    unets,
    video_autoencoders,
    videos,
    wan_videos,
)
from .classes import available, kind_of, sources_of

__all__ = ["CASES", "FAMILIES", "LEFT_OUT", "kind_of", "sources_of", "zoo_case"]

FAMILIES = (
    unets,
    controlnets,
    images,
    images_tokens,
    videos,
    wan_videos,
    more_videos,
    packed_videos,
    audio,
    autoencoders,
    video_autoencoders,
    audio_autoencoders,
)

#: those that the installed diffusers has the classes for
CASES: tuple[Case, ...] = tuple(
    case for cases in (small_cases, *(family.CASES for family in FAMILIES)) for case in cases if available(case)
)
LEFT_OUT: dict[str, str] = {name: reason for family in FAMILIES for name, reason in family.LEFT_OUT.items()}


def zoo_case(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: there is none.
    """
    return {each.name: each for each in CASES}[name]
