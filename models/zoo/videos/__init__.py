"""Diffusion transformers of videos: one file per family of models."""

from . import (
    allegro,
    cogvideox,
    cosmos,
    easy_animate,
    hunyuan,
    kandinsky,
    latte,
    ltx,
    minimax,
    mochi,
    motif,
    sana,
    temporal,
    wan,
)

FAMILIES = (
    hunyuan,
    ltx,
    mochi,
    cosmos,
    allegro,
    latte,
    cogvideox,
    wan,
    motif,
    easy_animate,
    sana,
    kandinsky,
    minimax,
    temporal,
)
