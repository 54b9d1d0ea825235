"""Arguments for one call of a small pipeline, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .pictures import FRAMES, SIZE, mask, picture, video
from .recipe import OMIT

PROMPT = "a red circle"

#: what a parameter of this name gets, in each pipeline that has it
ARGUMENTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PROMPT,
    "negative_prompt": lambda: "blue",
    "height": lambda: SIZE,
    "width": lambda: SIZE,
    "num_frames": lambda: FRAMES,
    "num_inference_steps": lambda: 2,
    "prior_num_inference_steps": lambda: 2,
    "decoder_num_inference_steps": lambda: 2,
    "super_res_num_inference_steps": lambda: 2,
    "max_sequence_length": lambda: 16,
    "output_type": lambda: "np",
    "generator": lambda: torch.Generator().manual_seed(0),
    "image": picture,
    "images": lambda: [picture()],
    "mask_image": mask,
    "control_image": lambda: picture(1),
    "video": video,
    "strength": lambda: 0.99,
    "_auto_resize": lambda: False,
    "max_area": lambda: SIZE * SIZE,
    "use_resolution_binning": lambda: False,
}


def arguments(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for one call: the general ones that the pipeline takes, and the `given` ones of its recipe."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    found = {name: make() for name, make in ARGUMENTS.items() if name in takes and name not in given}
    found |= {name: value(pipeline) if callable(value) else value for name, value in given.items()}
    return {name: value for name, value in found.items() if value is not OMIT}
