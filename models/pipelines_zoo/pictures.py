"""Processors of pictures, and example pictures, videos and sounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from .texts import PICTURE
from .tokenizers import CHAT, tokenizer

SIZE = 64  #: pixels per side of example pictures and of results
FRAMES = 9


def processor(kind: Any) -> Any:
    """A processor of pictures of the given class, or of pictures and text; None if it is none."""
    name = kind.__name__
    if name in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"):
        return _of_both(kind)
    if "ImageProcessor" in name:
        size: dict[str, Any] = {"height": PICTURE, "width": PICTURE}
        if "Siglip2" in name:
            return kind(patch_size=8, max_num_patches=16)
        crop = {"crop_size": size} if "CLIP" in name else {}
        return kind(size={"shortest_edge": PICTURE} if crop else size, **crop)
    return None


def _of_both(kind: Any) -> Any:
    """It takes no videos: their processors need torchvision."""

    def checked(self: Any, name: str, value: Any) -> type:
        return type(value)

    words = tokenizer("Qwen2Tokenizer")
    words.image_token, words.video_token = "<|image_pad|>", "<|video_pad|>"
    pictures = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    without_videos: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": checked})
    return without_videos(image_processor=pictures, tokenizer=words, chat_template=CHAT)


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    """Random colours, smooth over a few pixels."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def mask(size: int = SIZE) -> Image.Image:
    """White on the lower right, which is to be painted."""
    rows, columns = np.mgrid[:size, :size]
    return Image.fromarray(((rows + columns > size) * 255).astype(np.uint8))


def video(frames: int = FRAMES, size: int = SIZE) -> list[Image.Image]:
    return [picture(seed, size) for seed in range(frames)]


def embedding(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
