"""Real models without their weights: published configurations, usual sizes, and inputs as their pipelines pass them.

module, kwargs = load("sdxl", height=2048, width=2048)     # fake tensors: no memory, a few seconds
program = torch.export.export(module, (), kwargs, strict=False)
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .inputs import example_inputs
from .wrappers import Decode


@dataclass(frozen=True)
class Entry:
    """One published model and how its pipeline calls it.

    Attributes:
        name: what `get` and the command line know it by.
        summary: one line for a listing.
        model: its class; `config` are the published values that differ from the class's defaults.
        parameters: the published number of parameters.
        height, width: the usual output size in pixels; `frames` of video (1 for images).
        batch: samples per call: 2 where the pipeline batches the two guidance branches.
        dtype: the precision it is usually run in.
        multiple: heights and widths must be multiples of this many pixels.
        scale: pixels per latent row and column; frames per latent frame (after the first) is `frame_scale`.
        wrap: what makes the called module out of the model, for one half of an autoencoder.
    """

    name: str
    summary: str
    model: type[Any]
    config: dict[str, Any] = field(repr=False)
    parameters: int
    height: int
    width: int
    frames: int = 1
    batch: int = 2
    dtype: torch.dtype = torch.float16
    multiple: int = 8
    scale: int = 8
    frame_scale: int = 4
    wrap: Callable[[Any], nn.Module] | None = field(default=None, repr=False)

    def build(self) -> nn.Module:
        """The module with freshly initialised parameters, in eval mode; under a fake tensor mode it takes no memory."""
        model = self.model(**self.config).eval().requires_grad_(False)
        return model if self.wrap is None else self.wrap(model)

    def latent(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Latent (frames, rows, columns) of an output of `frames` x `height` x `width` pixels.

        Raises:
            ValueError: the model does not take this size.
        """
        if height % self.multiple or width % self.multiple or min(height, width) < self.multiple:
            raise ValueError(f"{self.name} takes multiples of {self.multiple} pixels, not {height} x {width}")
        if self.model is diffusers.DiTTransformer2DModel and height != width:
            raise ValueError(f"{self.name} takes squares, not {height} x {width}")
        if (frames - 1) % self.frame_scale:
            raise ValueError(f"{self.name} takes {self.frame_scale} k + 1 frames, not {frames}")
        return 1 + (frames - 1) // self.frame_scale, height // self.scale, width // self.scale

    def inputs(
        self,
        module: nn.Module,
        height: int | None = None,
        width: int | None = None,
        *,
        batch: int | None = None,
        frames: int | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Keyword arguments for one call of `module`; what is not given is the entry's usual size."""
        latent_frames, rows, cols = self.latent(height or self.height, width or self.width, frames or self.frames)
        return example_inputs(module, rows, cols, batch=batch or self.batch, frames=latent_frames, seed=seed)


_vae: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}

_entries = (
    Entry(
        "sd15",
        "Stable Diffusion 1.5, UNet",
        diffusers.UNet2DConditionModel,
        {"sample_size": 64, "cross_attention_dim": 768},
        parameters=859_520_964,
        height=512,
        width=512,
    ),
    Entry(
        "sdxl",
        "Stable Diffusion XL base 1.0, UNet",
        diffusers.UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        parameters=2_567_463_684,
        height=1024,
        width=1024,
    ),
    Entry(
        "dit-xl-256",
        "DiT-XL/2, 256 x 256 (675 M, of which diffusers keeps a label and time embedding per block)",
        diffusers.DiTTransformer2DModel,
        {"out_channels": 8, "sample_size": 32},
        parameters=749_826_464,
        height=256,
        width=256,
        multiple=16,
    ),
    Entry(
        "dit-xl-512",
        "DiT-XL/2, 512 x 512",
        diffusers.DiTTransformer2DModel,
        {"out_channels": 8, "sample_size": 64},
        parameters=749_826_464,
        height=512,
        width=512,
        multiple=16,
    ),
    Entry(
        "pixart-sigma",
        "PixArt-Sigma XL/2, 1024 x 1024",
        diffusers.PixArtTransformer2DModel,
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        parameters=610_856_096,
        height=1024,
        width=1024,
        multiple=16,
    ),
    Entry(
        "sd35-medium",
        "Stable Diffusion 3.5 medium, MMDiT-X",
        diffusers.SD3Transformer2DModel,
        {
            "qk_norm": "rms_norm",
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        parameters=2_243_171_520,
        height=1024,
        width=1024,
        dtype=torch.bfloat16,
        multiple=16,
    ),
    Entry(
        "sd35-large",
        "Stable Diffusion 3.5 large, MMDiT",
        diffusers.SD3Transformer2DModel,
        {
            "qk_norm": "rms_norm",
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        parameters=8_056_627_520,
        height=1024,
        width=1024,
        dtype=torch.bfloat16,
        multiple=16,
    ),
    Entry(
        "flux-dev",
        "FLUX.1 [dev], guidance-distilled",
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        parameters=11_901_408_320,
        height=1024,
        width=1024,
        batch=1,
        dtype=torch.bfloat16,
        multiple=16,
    ),
    Entry(
        "hunyuan-dit",
        "HunyuanDiT 1.2, 1024 x 1024",
        diffusers.HunyuanDiT2DModel,
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },
        parameters=1_499_952_032,
        height=1024,
        width=1024,
        multiple=16,
    ),
    Entry(
        "sana-1600m",
        "Sana 1.6B, linear attention on a 32-fold compressed latent",
        diffusers.SanaTransformer2DModel,
        {},
        parameters=1_604_462_752,
        height=1024,
        width=1024,
        dtype=torch.bfloat16,
        multiple=32,
        scale=32,
    ),
    Entry(
        "wan21-1.3b",
        "Wan 2.1 text-to-video 1.3B, 480p (the two guidance branches are separate calls)",
        diffusers.WanTransformer3DModel,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        parameters=1_418_996_800,
        height=480,
        width=832,
        frames=81,
        batch=1,
        dtype=torch.bfloat16,
        multiple=16,
    ),
    Entry(
        "wan21-14b",
        "Wan 2.1 text-to-video 14B, 480p (the two guidance branches are separate calls)",
        diffusers.WanTransformer3DModel,
        {},
        parameters=14_288_491_584,
        height=480,
        width=832,
        frames=81,
        batch=1,
        dtype=torch.bfloat16,
        multiple=16,
    ),
    Entry(
        "cogvideox-2b",
        "CogVideoX 2B, 480 x 720, 49 frames",
        diffusers.CogVideoXTransformer3DModel,
        {},
        parameters=1_693_783_872,
        height=480,
        width=720,
        frames=49,
        multiple=16,
    ),
    Entry(
        "cogvideox-5b",
        "CogVideoX 5B, rotary positions, 480 x 720, 49 frames",
        diffusers.CogVideoXTransformer3DModel,
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        parameters=5_570_283_072,
        height=480,
        width=720,
        frames=49,
        dtype=torch.bfloat16,
        multiple=16,
    ),
    Entry(
        "sd-vae-decode",
        "the decoder half of Stable Diffusion's VAE",
        diffusers.AutoencoderKL,
        _vae,
        parameters=83_653_863,
        height=512,
        width=512,
        batch=1,
        dtype=torch.float32,
        wrap=Decode,
    ),
)

catalog: dict[str, Entry] = {entry.name: entry for entry in _entries}


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
        device: where the tensors live; fake ones, too, claim only devices that this torch knows.
        fake: make fake tensors, which have shapes but no values; otherwise random parameters, at full size.

    Raises:
        LookupError: the name is not in the catalog.
        ValueError: the model does not take this size.
    """
    entry = get(name)
    height, width = height or width or entry.height, width or height or entry.width
    entry.latent(height, width, frames or entry.frames)  # refuses before it builds
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode:
        module = cast(entry.build(), dtype or entry.dtype, torch.device(device))
        return module, entry.inputs(module, height, width, batch=batch, frames=frames)


def cast(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`module.to(device, dtype)` for fake modules too (those refuse `to`), sparing what its class keeps in float32."""
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
