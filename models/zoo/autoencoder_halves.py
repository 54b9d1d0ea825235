"""Build the two cases of an autoencoder, decoder and encoder, with latents and samples of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from ..case import Case
from ..inputs import Draw, Maker, Size
from ..wrappers import Decode, Encode


class Shapes(Protocol):
    """The shapes of one example: its latent and its sample."""

    def latent(self, size: Size) -> tuple[int, ...]: ...

    def sample(self, size: Size) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Pictures:
    """Images and videos.

    Attributes:
        channels: of the latent.
        colours: channels of the sample.
        space: pixels per row or column of the latent.
        clip: frames of the sample from those of the latent; `None` for images, which have no frames.
    """

    channels: int
    colours: int = 3
    space: int = 2
    clip: Callable[[int], int] | None = None

    def latent(self, size: Size) -> tuple[int, ...]:
        frames = () if self.clip is None else (size.frames,)
        return size.batch, self.channels, *frames, size.rows, size.cols

    def sample(self, size: Size) -> tuple[int, ...]:
        frames = () if self.clip is None else (self.clip(size.frames),)
        return size.batch, self.colours, *frames, size.rows * self.space, size.cols * self.space


@dataclass(frozen=True)
class Sounds:
    """Audio: `hop` samples of each of `tracks` per row of the latent, which has no columns."""

    channels: int
    tracks: int
    hop: int

    def latent(self, size: Size) -> tuple[int, ...]:
        return size.batch, self.channels, size.rows

    def sample(self, size: Size) -> tuple[int, ...]:
        return size.batch, self.tracks, size.rows * self.hop


def causal(time: int) -> Callable[[int], int]:
    """Sample frames of a causal video autoencoder: one for the first latent frame, `time` for each further one."""
    return lambda frames: 1 + (frames - 1) * time


def halves(
    name: str,
    model: Callable[[], nn.Module],
    shapes: Shapes,
    *,
    covers: str,
    decode: Maker | None = None,
    encode: Maker | None = None,
    **options: Any,
) -> tuple[Case, Case]:
    """`name_decode` and `name_encode`.

    Args:
        covers: name of the class.
        decode, encode: further arguments of the halves.
    """

    def decoded(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
        more = {} if decode is None else decode(module, size, draw)
        return {"latent": draw.normal(*shapes.latent(size))} | more

    def encoded(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
        more = {} if encode is None else encode(module, size, draw)
        return {"sample": draw.normal(*shapes.sample(size))} | more

    case = partial(Case, text=None, covers=covers, **options)
    return (
        case(f"{name}_decode", lambda: Decode(model()), maker=decoded),
        case(f"{name}_encode", lambda: Encode(model()), maker=encoded),
    )
