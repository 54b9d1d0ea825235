"""What the pipeline of a model holds beside its denoiser, for predictions of memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from .catalog import catalog
from .catalog.parts import BESIDE, ENCODERS
from .library import diffusers
from .resolve import Options, Resolved, built, denoiser_of, pixels_per_row, read_config, resolve, usual_size
from .wrappers import Decode


@dataclass(frozen=True)
class Held:
    """The parts of a pipeline beside its denoiser.

    Attributes:
        weights: bytes of the weights of each part, by name.
        decoder: one decode of the pipeline's output, with fake tensors; None if it is not known.
    """

    weights: dict[str, int]
    decoder: Resolved | None


def beside(model: str, options: Options) -> Held | None:
    """What the pipeline of the denoiser `model` holds beside it. `options` are those of the denoiser.

    None if `model` is no pipeline: a small model, a factory, a folder with one model, or a catalog name whose pipeline
    is not known.

    Raises:
        ResolveError, ValueError: as `resolve`.
    """
    if model in BESIDE:
        return _of_catalog(model, options)
    folder = Path(model)
    if model in catalog or not (folder / "model_index.json").is_file():
        return None
    return _of_folder(folder, options)


def _of_catalog(model: str, options: Options) -> Held:
    entry, (encoders, decoder) = catalog[model], BESIDE[model]
    size = (options.dtype or entry.dtype).itemsize
    weights = {name: ENCODERS[name] * size for name in encoders}
    if decoder is None:
        return Held(weights, None)
    vae = catalog[decoder]
    height, width = options.height or options.width or entry.height, options.width or options.height or entry.width
    frames = (options.frames or entry.frames) if vae.frames > 1 else None
    made = resolve(decoder, Options(height, width, frames, 1))
    return Held(weights | {"autoencoder": vae.parameters * vae.dtype.itemsize}, made)


def _of_folder(folder: Path, options: Options) -> Held:
    index = read_config(folder / "model_index.json") or {}
    parts = [name for name in index if (folder / name / "config.json").is_file()]
    denoiser = denoiser_of(parts)
    dtype = options.dtype or torch.float32
    weights = {name: sum(_sizes(folder / name, dtype)) for name in parts if name != denoiser}
    decoder = None
    if denoiser is not None and "vae" in parts:
        config = read_config(folder / denoiser / "config.json") or {}
        scale = pixels_per_row(config, folder, None)
        rows, cols = usual_size(config, None)
        height, width = options.height or options.width, options.width or options.height
        wanted = replace(options, height=height or rows * scale, width=width or cols * scale, batch=1, fake=True)
        if (read_config(folder / "vae" / "config.json") or {}).get("_class_name") == diffusers.AutoencoderKL.__name__:
            module, args, kwargs = built(folder / "vae", folder, wanted)
            assert isinstance(module, Decode)
            decoder = Resolved(f"{folder.name}/vae", module, args, kwargs)
    return Held(weights, decoder)


def _sizes(folder: Path, dtype: torch.dtype) -> Iterator[int]:
    """Bytes of the weights in a folder, as they are when floating-point numbers have become `dtype`.

    Variants (`model.fp16.safetensors` beside `model.safetensors`), and files of the other format, hold the same once
    more.
    """
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*pytorch_model*.bin"))
    dots = min((path.name.count(".") for path in paths), default=0)
    for path in (path for path in paths if path.name.count(".") == dots):
        for shape, size, floating in _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path):
            yield prod(shape) * dtype.itemsize if floating else size


def _of_safetensors(path: Path) -> Iterator[tuple[Sequence[int], int, bool]]:
    """Of each tensor in a file: its shape, its bytes, and whether it has floating-point numbers."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, tensor in header.items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            yield tensor["shape"], last - first, tensor["dtype"].startswith(("F", "BF"))


def _of_pickle(path: Path) -> Iterator[tuple[Sequence[int], int, bool]]:
    """The same of a file that `torch.save` wrote."""
    for tensor in torch.load(path, map_location="meta", weights_only=True).values():
        yield tensor.shape, tensor.nbytes, tensor.is_floating_point()
