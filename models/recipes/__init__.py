"""How pipelines call the classes of models: one file per kind, each ending in its `MAKERS`, by name of the class."""

from __future__ import annotations

from ..draw import Maker
from . import audio, autoencoders, images, pictures, tokens, unets, videos

KINDS = (unets, images, pictures, tokens, videos, audio, autoencoders)

MAKERS: dict[str, Maker] = {name: maker for kind in KINDS for name, maker in kind.MAKERS.items()}
