"""Where pipelines keep their denoisers."""

from __future__ import annotations

from typing import Any

from torch import nn

DENOISERS = ("transformer", "unet", "transformer_2", "prior")  #: attribute names; a pipeline may have several


def denoisers(pipeline: Any) -> list[str]:
    """The attributes of `pipeline` that are denoisers, the first the main one."""
    return [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]
