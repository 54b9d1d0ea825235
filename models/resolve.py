"""Resolve what the command line calls MODEL: a catalog name, `small:NAME`, a folder, or `package.module:factory`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from .catalog import Entry, cast, catalog, load
from .inputs import example_inputs, takes_inputs
from .library import diffusers
from .small import cases
from .wrappers import Decode


class ResolveError(ValueError):
    """A MODEL string cannot be resolved; the message says why, and suggests near names."""


@dataclass(frozen=True)
class Options:
    """Options of a model; `None` means the model's usual value.

    Attributes:
        height, width: pixels of the output; a square if only one is given.
        frames: frames of video.
        batch: samples per call, guidance branches counted.
        dtype: of parameters and inputs.
        fake: build without weights (fake tensors); otherwise catalog models get random values, folders their weights.
    """

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int | None = None
    dtype: torch.dtype | None = None
    fake: bool = True


@dataclass(frozen=True)
class Resolved:
    """A module and the arguments of one example call."""

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def resolve(model: str, options: Options = Options()) -> Resolved:
    """Build the module and example inputs that `model` names: a catalog name, a folder, or `package.module:factory`.

    `small:NAME` is a tiny model with random weights; its heights and widths are those of the latent.
    A folder is a diffusers pipeline (its denoiser is taken) or a single model. A factory is called without arguments
    and returns a module, `(module, kwargs)` or `(module, args, kwargs)`; it decides sizes and precision itself.

    Raises:
        ResolveError: nothing has this name, or what has it cannot be used.
        ValueError: the model does not take the size that `options` ask for.
    """
    if model in catalog:
        module, kwargs = load(
            model,
            height=options.height,
            width=options.width,
            frames=options.frames,
            batch=options.batch,
            dtype=options.dtype,
            fake=options.fake,
        )
        return Resolved(model, module, (), kwargs)
    if model.startswith("small:"):
        return _from_small(model, options)
    if Path(model).is_dir():
        return _from_folder(Path(model), options)
    if ":" in model and not Path(model).exists():
        return _from_factory(model, options)
    raise ResolveError(f"no model {model!r}: {_why_not(model)}")


def _why_not(model: str) -> str:
    path = Path(model)
    if path.exists():
        return "it is a file; give the diffusers folder that holds config.json or model_index.json"
    if path.parent.is_dir() and path.parent != Path():
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()]
        return f"{path.parent} has no such folder{_suggest(path.name, siblings)}"
    known = [*catalog, *(f"small:{case.name}" for case in cases)]
    near = _suggest(model, known)
    return f"it is not in the catalog (see `fxpass models`), no folder, and not package.module:factory{near}"


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _from_small(model: str, options: Options) -> Resolved:
    names = {case.name: case for case in cases}
    name = model.removeprefix("small:")
    if name not in names:
        hint = _suggest(name, names) or f"; they are {', '.join(names)}"
        raise ResolveError(f"no small model is called {name!r}{hint}")
    case = names[name]
    if options.frames is not None:
        raise ResolveError(f"{model} has a fixed number of frames: {case.frames}")
    module = case.build()
    if options.dtype is not None:
        module = cast(module, options.dtype, torch.device("cpu"))
    rows, cols = options.height or options.width or 32, options.width or options.height or 16
    return Resolved(model, module, (), case.inputs(rows, options.batch or 1, cols=cols, module=module))


# -------------------------------------------------------------------------------------------------- folders


def _from_folder(folder: Path, options: Options) -> Resolved:
    index = read_config(folder / "model_index.json")
    if index is None:
        return Resolved(folder.name, *built(folder, None, options))
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    denoiser = denoiser_of(parts)
    if denoiser is None:
        raise ResolveError(f"{folder} is a pipeline without `transformer` or `unet`: it has {', '.join(parts)}")
    return Resolved(f"{folder.name}/{denoiser}", *built(folder / denoiser, folder, options))


def denoiser_of(parts: Iterable[str]) -> str | None:
    """Which of the parts of a pipeline is its denoiser."""
    return next((name for name in ("transformer", "unet") if name in parts), None)


def built(folder: Path, pipeline: Path | None, options: Options) -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """Build the model of one folder, with the inputs that its pipeline (if any) would pass."""
    config = read_config(folder / "config.json")
    if config is None:
        raise ResolveError(f"{folder} has no config.json (a model) and no model_index.json (a pipeline)")
    kind = config.get("_class_name", "nothing")
    cls = getattr(diffusers, kind, None)
    if cls is None or not issubclass(cls, nn.Module):
        models = [name for name in dir(diffusers) if name.endswith("Model")]
        raise ResolveError(
            f"{folder / 'config.json'} names {kind!r}, which this diffusers does not have{_suggest(kind, models)}"
        )
    with FakeTensorMode(allow_non_fake_inputs=True) if options.fake else contextlib.nullcontext():
        if options.fake:
            module = cls.from_config(config)
            module = cast(module, options.dtype or torch.float32, torch.device("cpu"))
        else:
            module = cls.from_pretrained(folder, torch_dtype=options.dtype or torch.float32)
        module = module.eval().requires_grad_(False)
        if isinstance(module, diffusers.AutoencoderKL):
            module = Decode(module)
        return module, (), _inputs(module, config, pipeline, options)


def _inputs(module: nn.Module, config: dict[str, Any], pipeline: Path | None, options: Options) -> dict[str, Any]:
    """Example inputs: sizes from the options, else the configuration, else the catalog's model of the same class."""
    if not takes_inputs(module):
        raise ResolveError(
            f"no example inputs are known for {type(module).__name__}; write a factory that returns (module, kwargs) "
            "and name it as package.module:factory"
        )
    entry = next((each for each in catalog.values() if config["_class_name"] == each.model.__name__), None)
    scale, frame_scale = pixels_per_row(config, pipeline, entry), entry.frame_scale if entry else 1
    rows, cols = usual_size(config, entry)
    height, width = options.height or options.width, options.width or options.height
    if height and width:
        if height % scale or width % scale:
            raise ValueError(f"sizes are multiples of {scale} pixels, not {height} x {width}")
        rows, cols = height // scale, width // scale
    frames = options.frames or config.get("sample_frames") or (entry.frames if entry else 16)
    return example_inputs(
        module,
        rows,
        cols,
        batch=options.batch or (entry.batch if entry else 1),
        frames=1 + (frames - 1) // frame_scale,
        text=_text_length(config, pipeline),
    )


def usual_size(config: dict[str, Any], entry: Entry | None) -> tuple[int, int]:
    """Rows and columns of a latent, where nothing else is asked for."""
    if config["_class_name"] == "AutoencoderKL":  # its sample_size counts pixels
        size = config.get("sample_size", 512) // 2 ** (len(config["block_out_channels"]) - 1)
        return size, size
    if "sample_height" in config:
        return config["sample_height"], config["sample_width"]
    size = config.get("sample_size")
    if size is not None:
        return (size, size) if isinstance(size, int) else (size[0], size[1])
    return entry.latent(entry.height, entry.width, entry.frames)[1:] if entry else (64, 64)


def pixels_per_row(config: dict[str, Any], pipeline: Path | None, entry: Entry | None) -> int:
    """Pixels per row of the denoiser's sample: from the pipeline's autoencoder, else as for its class."""
    vae = (
        config
        if config["_class_name"] == "AutoencoderKL"
        else pipeline and read_config(pipeline / "vae" / "config.json")
    )
    channels = vae and (vae.get("encoder_block_out_channels") or vae.get("block_out_channels"))
    if channels:
        return 2 ** (len(channels) - 1)
    if entry is not None:
        return entry.scale
    return 1 if config["_class_name"] == "UNet2DModel" else 8


def _text_length(config: dict[str, Any], pipeline: Path | None) -> int | None:
    """UNets see the tokenizer's full padded length; pipelines of transformers choose a length of their own."""
    tokenizer = pipeline and read_config(pipeline / "tokenizer" / "tokenizer_config.json")
    if not tokenizer or not config["_class_name"].startswith("UNet"):
        return None
    length = tokenizer.get("model_max_length", 77)
    return length if length < 10_000 else None  # tokenizers without a limit write 1e30


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration in a file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResolveError(f"{path} is not valid JSON: {error}") from None


# ------------------------------------------------------------------------------------------------ factories


def _from_factory(model: str, options: Options) -> Resolved:
    path, _, name = model.partition(":")
    if os.getcwd() not in sys.path:  # console scripts lack it
        sys.path.insert(0, os.getcwd())
    try:
        holder = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module exists, but not something that it imports
        raise ResolveError(f"no model {model!r}: there is no module {error.name!r} to import") from None
    except (ValueError, TypeError):
        raise ResolveError(f"no model {model!r}: {path!r} is no dotted module path") from None
    factory = getattr(holder, name, None)
    if factory is None:
        made = [known for known, value in vars(holder).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise ResolveError(f"no model {model!r}: {path} has no {name!r}{_suggest(name, made)}")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ResolveError(
            f"no model {model!r}: {name} is a {type(factory).__name__}, not a callable that makes a model"
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ResolveError(f"no model {model!r}: a factory is called without arguments, but {error}") from None
    except ValueError:  # what is written in C may not say what it takes
        pass
    return _from_result(model, factory(), options)


def _from_result(model: str, made: Any, options: Options) -> Resolved:
    expected = "a module, (module, kwargs) or (module, args, kwargs)"
    parts = made if isinstance(made, tuple) else (made,)
    if not parts or not isinstance(parts[0], nn.Module):
        kind = ", ".join(type(part).__name__ for part in parts)
        raise ResolveError(f"{model} returned ({kind}); it must return {expected}")
    match parts:
        case (module,):
            config = getattr(module, "config", None)
            config = {**(config if isinstance(config, dict) else {}), "_class_name": type(module).__name__}
            return Resolved(model, module, (), _inputs(module, config, None, options))
        case (module, dict() as kwargs):
            args: tuple[Any, ...] = ()
        case (module, tuple() | list() as given, dict() as kwargs):
            args = tuple(given)
        case _:
            kind = ", ".join(type(part).__name__ for part in parts)
            raise ResolveError(f"{model} returned ({kind}); it must return {expected}")
    if any((options.height, options.width, options.frames, options.batch)):
        raise ResolveError(f"{model} gives its own inputs: sizes and batch are chosen there")
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        name = type(module).__name__
        raise ResolveError(f"{model} returned inputs that do not fit forward() of {name}: {error}") from None
    return Resolved(model, module, args, kwargs)
