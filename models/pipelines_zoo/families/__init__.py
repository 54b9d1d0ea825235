"""How the pipelines of each family differ from the general construction."""

from __future__ import annotations

from ..recipe import Recipe
from . import audio, cascades, flux, images, kandinsky, others, pixels, unets, videos, xl

FAMILIES = (unets, xl, flux, images, kandinsky, cascades, pixels, videos, audio, others)
RECIPES: dict[str, Recipe] = {name: recipe for family in FAMILIES for name, recipe in family.RECIPES.items()}
