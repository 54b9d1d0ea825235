"""A small pipeline of every class that diffusers exports, with encoders and tokenizers made on the spot.

build                              the construction by the classes in the pipeline's signature
parts, texts, tokenizers, pictures, calls    what it is made of, and the arguments of its call
families/                          by family, how pipelines differ from it: data, one `RECIPES` per file
"""

from __future__ import annotations

from .build import RECIPES, Small, build, files_of, names

__all__ = ["RECIPES", "Small", "build", "files_of", "names"]
