"""Published models without their weights: configuration, usual size, and inputs as the model's pipeline passes them.

    module, kwargs = load("sdxl", height=2048, width=2048)  # fake tensors: no memory, a few seconds
    program = fxpass.capture(module, **kwargs)

One file per kind of model, each ending in its `ENTRIES`.
"""

from __future__ import annotations

import contextlib
import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .. import library  # noqa: F401 - first: it says what to do where diffusers is missing
from . import audio, autoencoders, images, unets, videos
from .entry import Entry

KINDS = (unets, images, videos, audio, autoencoders)

catalog: dict[str, Entry] = {entry.name: entry for kind in KINDS for entry in kind.ENTRIES}


def get(name: str) -> Entry:
    """The entry of this name.

    Raises:
        LookupError: there is none; the message suggests the nearest names.
    """
    if name in catalog:
        return catalog[name]
    near = difflib.get_close_matches(name.lower(), catalog, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(catalog)}"
    raise LookupError(f"no model named {name!r} in the catalog; {hint}")


def load(
    name: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    fake: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """The module of a catalog entry and the keyword arguments of one call.

    Args:
        height, width: output pixels; the entry's usual size by default, and a square if only one is given.
        frames: frames of video.
        batch: samples per call, guidance branches counted.
        dtype: of parameters and inputs; the precision the model is usually run in by default.
        device: of the tensors, also of fake ones; this torch must know it.
        fake: make fake tensors, which have shapes but no values; otherwise random parameters, at full size.

    Raises:
        LookupError: the name is not in the catalog.
        ValueError: the model does not take this size.
    """
    entry = get(name)
    height, width = height or width or entry.height, width or height or entry.width
    entry.latent(height, width, frames or entry.frames)  # raise before building
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode:
        with torch.device(device):  # build large models where there is memory for them
            module = entry.build()
        module = cast(module, dtype or entry.dtype, torch.device(device))
        return module, entry.inputs(module, height, width, batch=batch, frames=frames)


def cast(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`module.to(device, dtype)`, also for fake modules (which refuse `to`); keeps what its class keeps in float32."""
    kept = {name for each in module.modules() for name in getattr(each, "_keep_in_fp32_modules", None) or ()}

    def converted(value: Tensor, path: str) -> Tensor:
        spared = not value.is_floating_point() or kept.intersection(path.split("."))
        return value.detach().to(device, value.dtype if spared else dtype)

    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(converted(parameter, f"{path}.{name}"), requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, converted(buffer, f"{path}.{name}"))
    return module
