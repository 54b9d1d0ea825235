"""Build a small pipeline, and call it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from .calls import arguments
from .families import FAMILIES, RECIPES
from .parts import Parts
from .recipe import Recipe

__all__ = ["RECIPES", "Small", "build", "files_of", "names"]

BASE = ("DiffusionPipeline",)


@dataclass(frozen=True)
class Small:
    """A small pipeline and what its call gets besides the arguments that every pipeline gets."""

    pipeline: Any
    recipe: Recipe

    def run(self) -> list[Tensor]:
        """One call with fixed seeds: all tensors of its result, in order."""
        torch.manual_seed(0)
        with torch.no_grad():
            return list(tensors(self.pipeline(**arguments(self.pipeline, self.recipe.call))))


def names() -> list[str]:
    """Every pipeline class that diffusers exports, also those whose packages are missing, without the base class."""
    found = [name for name in dir(diffusers) if name.endswith("Pipeline") and name not in BASE]
    return [name for name in found if _is_pipeline(getattr(diffusers, name))]


def files_of(name: str) -> list[Path]:
    """The file of families that has the recipe of a class, if it has one."""
    found = [family for family in FAMILIES if name in family.RECIPES]
    return [Path(str(family.__file__)) for family in found]


def build(name: str) -> Small:
    """A small pipeline of the class of this name.

    Raises:
        ImportError: it is left out: the message has the package or the download that is missing.
    """
    kind = getattr(diffusers, name)
    recipe = RECIPES.get(name, Recipe())
    if packages := _missing(kind):
        raise ImportError(f"needs the package {packages}")
    if recipe.left_out:
        raise ImportError(recipe.left_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = kind(**Parts(kind, recipe).arguments())
    for constant, value in recipe.constants.items():
        module = sys.modules[kind.__module__]
        setattr(module if hasattr(module, constant) else pipeline, constant, value)
    pipeline.set_progress_bar_config(disable=True)
    return Small(pipeline, recipe)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors, arrays and pictures of a pipeline's result, as tensors, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(value)
    elif hasattr(value, "getbands"):
        yield torch.from_numpy(np.asarray(value).astype(np.float32) / 255)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


def _is_pipeline(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, diffusers.DiffusionPipeline) or bool(_missing(kind)))


def _missing(kind: Any) -> str:
    """The packages that diffusers' placeholder of a class asks for, without the installed ones."""
    from diffusers.utils import import_utils

    wanted = getattr(kind, "_backends", ()) if not hasattr(kind, "_get_signature_types") else ()
    return ", ".join(each for each in wanted if not getattr(import_utils, f"is_{each}_available")())
