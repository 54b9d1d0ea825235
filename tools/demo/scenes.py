"""Captioned scenes of the trained demo: a small grammar, a renderer, and a reader that names what an image shows.

A scene is a shape with a colour, a texture and a position on a background. `draw_scene` samples one, `caption`
describes it, `render` draws it at any size, and `read_things` names what an image shows, so that images can be scored
without a second model. Everything is a function of its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.13, 0.13),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.87, 0.14),
    "green": (0.16, 0.66, 0.22),
    "cyan": (0.12, 0.78, 0.80),
    "blue": (0.16, 0.28, 0.88),
    "purple": (0.52, 0.16, 0.76),
    "pink": (0.96, 0.44, 0.70),
}
TEXTURES = ("plain", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # top and bottom colour
    "white": ((0.97, 0.97, 0.97), (0.97, 0.97, 0.97)),
    "grey": ((0.55, 0.55, 0.55), (0.55, 0.55, 0.55)),
    "black": ((0.04, 0.04, 0.04), (0.04, 0.04, 0.04)),
    "beige": ((0.93, 0.89, 0.80), (0.93, 0.89, 0.80)),
    "sunset": ((0.80, 0.78, 0.93), (0.98, 0.88, 0.80)),
    "night": ((0.03, 0.03, 0.12), (0.24, 0.26, 0.38)),
}
POSITIONS: dict[str, tuple[float, float]] = {  # words -> (x, y) as fractions of the width and the height
    f"{words}": (x, y)
    for words, x, y in (
        ("at the top left", 0.27, 0.27),
        ("at the top", 0.50, 0.27),
        ("at the top right", 0.73, 0.27),
        ("on the left", 0.27, 0.50),
        ("in the centre", 0.50, 0.50),
        ("on the right", 0.73, 0.50),
        ("at the bottom left", 0.27, 0.73),
        ("at the bottom", 0.50, 0.73),
        ("at the bottom right", 0.73, 0.73),
    )
}


@dataclass(frozen=True)
class Scene:
    """A shape on a background; all fields are words of the grammar."""

    shape: str
    colour: str
    texture: str
    position: str
    background: str

    @property
    def caption(self) -> str:
        """The canonical caption: every fact."""
        return f"{self.thing} {self.position}, {self.background} background"

    @property
    def thing(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"{article} {self.colour}{texture} {self.shape}"

    def paraphrase(self, rng: np.random.Generator) -> str:
        """A caption in other words; one in ten omits the position, and one in ten the background."""
        text = self.thing + (f" {self.position}" if rng.random() > 0.1 else "")
        kind = rng.random()
        if kind < 0.55:
            return f"{text}, {self.background} background"
        return f"{text} on a {self.background} background" if kind < 0.9 else text

    @property
    def held_out(self) -> bool:
        """Whether this combination is excluded from training: one in ten, by hash of the canonical caption."""
        return int(hashlib.sha256(self.caption.encode()).hexdigest(), 16) % 10 == 0


def draw_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A random scene of the training part of the grammar (or of its held-out part)."""
    while True:
        texture = "plain" if rng.random() < 0.5 else str(rng.choice(TEXTURES[1:]))
        shape, colour, position, background = (
            str(rng.choice(list(words))) for words in (SHAPES, COLOURS, POSITIONS, BACKGROUNDS)
        )
        scene = Scene(shape, colour, texture, position, background)
        if scene.held_out == held_out:
            return scene


def _polygon(x: Array, y: Array, sides: int, inner: float) -> Array:
    """Signed distance bound of a regular polygon of circumradius 1, pointing up.

    `inner` is the inradius."""
    angles = np.pi * (2 * np.arange(sides) + 1) / sides
    return np.max([x * np.sin(a) - y * np.cos(a) for a in angles], axis=0) - np.float32(inner)


def _star(x: Array, y: Array) -> Array:
    sector = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)  # folded: a tip at 0, a notch at sector / 2
    radius = np.hypot(x, y)
    px, py = radius * np.sin(angle), radius * np.cos(angle)
    notch = (0.42 * np.sin(np.pi / 5), 0.42 * np.cos(np.pi / 5))
    nx, ny = 1 - notch[1], notch[0]  # normal of the edge from the tip (0, 1) to the notch
    return ((px * nx + (py - 1) * ny) / np.hypot(nx, ny)).astype(np.float32)


_OUTLINES: dict[str, Callable[[Array, Array], Array]] = {  # signed distance to the outline, for a shape of radius 1
    "circle": lambda x, y: np.hypot(x, y) - np.float32(0.95),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - np.float32(0.84),
    "triangle": lambda x, y: _polygon(x, y - np.float32(0.22), 3, 0.6),
    "star": lambda x, y: _star(x / np.float32(1.1), y / np.float32(1.1)) * np.float32(1.1),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - np.float32(0.74)) - np.float32(0.22),
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - np.float32(0.3), np.abs(y) - np.float32(0.92)),
        np.maximum(np.abs(y) - np.float32(0.3), np.abs(x) - np.float32(0.92)),
    ),
}


def render(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Array:
    """The scene as an image [height, width, 3] in 0..1; `rng` jitters place, size and colour a little."""
    side = min(height, width)
    top, bottom = (np.array(c, np.float32) for c in BACKGROUNDS[scene.background])
    fade = ((np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height))[:, None, None]
    picture = np.broadcast_to(top * (1 - fade) + bottom * fade, (height, width, 3)).astype(np.float32, order="C")
    fx, fy = POSITIONS[scene.position]
    radius = side * rng.uniform(0.20, 0.25)
    cx = width * fx + side * rng.uniform(-0.02, 0.02)
    cy = height * fy + side * rng.uniform(-0.02, 0.02)
    tint = np.clip(np.array(COLOURS[scene.colour]) + rng.uniform(-0.03, 0.03, 3), 0, 1).astype(np.float32)
    reach = 1.2 * radius + 1
    y0, y1 = max(int(cy - reach), 0), min(int(cy + reach) + 1, height)
    x0, x1 = max(int(cx - reach), 0), min(int(cx + reach) + 1, width)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + np.float32(0.5)
    colour, alpha = _paint(scene, (x - cx) / radius, (y - cy) / radius, tint, radius)
    picture[y0:y1, x0:x1] += (colour - picture[y0:y1, x0:x1]) * alpha
    return picture


def _paint(scene: Scene, u: Array, v: Array, tint: Array, radius: float) -> tuple[Array, Array]:
    """Colour [h, w, 3] and coverage [h, w, 1] of the shape, in its own coordinates (its radius is 1)."""
    light = 1 - np.float32(0.10) * np.clip(np.hypot(u + np.float32(0.4), v + np.float32(0.5)), 0, 2)
    often, half = np.float32(1.7), np.float32(0.5)
    scale = np.float32(radius / 1.7)
    if scene.texture == "striped":
        light *= 1 - np.float32(0.42) * _step((np.abs((u * often + half / 2) % 1 - half) - np.float32(0.22)) * scale)
    elif scene.texture == "dotted":
        du, dv = ((w * often + half) % 1 - half for w in (u, v))
        light *= 1 - np.float32(0.42) * _step((np.hypot(du, dv) - np.float32(0.27)) * scale)
    return tint * light[..., None], _step(_OUTLINES[scene.shape](u, v) * radius)[..., None]


def _step(distance: Array) -> Array:
    """Coverage of a pixel whose centre lies at a signed distance (in pixels) from an outline."""
    return np.clip(np.float32(0.5) - distance, 0, 1).astype(np.float32)


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected parts (8 neighbours) of a mask, by spreading the largest label."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = labels
        for dy, dx in product(range(3), range(3)):
            spread = np.maximum(spread, padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]])
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            return [labels == k for k in np.unique(labels) if k]
        labels = spread


def _box(mask: NDArray[np.bool_], grid: int = 32) -> NDArray[np.bool_]:
    """The mask's bounding box, resampled to [grid, grid]."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    at = (np.arange(grid) + 0.5) / grid
    pick_rows = rows[0] + (at * (rows[-1] + 1 - rows[0])).astype(int)
    pick_cols = cols[0] + (at * (cols[-1] + 1 - cols[0])).astype(int)
    return mask[np.ix_(pick_rows, pick_cols)]


@cache
def _templates() -> dict[str, NDArray[np.bool_]]:
    y, x = np.mgrid[-1.2:1.2:128j, -1.2:1.2:128j].astype(np.float32)
    return {shape: _box(outline(x, y) < 0) for shape, outline in _OUTLINES.items()}


def read_things(picture: Array) -> list[tuple[str, str, str]]:
    """What an image [H, W, 3] in 0..1 shows, as (shape, colour, position) triples in reading order of the positions.

    Objects are connected saturated areas of at least 0.8 % of the image; the shape is the outline of best overlap
    (intersection over union in its box), the colour is the name nearest to the median of the brighter half.
    """
    height, width, _ = picture.shape
    chroma = picture.max(-1) - picture.min(-1)
    found = []
    for part in _components(chroma > 0.21):
        if part.sum() < 0.008 * min(height, width) ** 2:
            continue
        box = _box(part)
        overlap = {s: (box & t).sum() / (box | t).sum() for s, t in _templates().items()}
        pixels = picture[part]
        bright = pixels[pixels.max(-1) >= np.median(pixels.max(-1))]
        tone = np.median(bright, axis=0)
        tone = tone / tone.max()
        colour = min(COLOURS, key=lambda c: float(np.abs(np.array(COLOURS[c]) / max(COLOURS[c]) - tone).sum()))
        rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        cx, cy = (cols[0] + cols[-1] + 1) / 2 / width, (rows[0] + rows[-1] + 1) / 2 / height
        position = min(POSITIONS, key=lambda p: (POSITIONS[p][0] - cx) ** 2 + (POSITIONS[p][1] - cy) ** 2)
        found.append((max(overlap, key=lambda s: overlap[s]), colour, position))
    return sorted(found, key=lambda f: list(POSITIONS).index(f[2]))
