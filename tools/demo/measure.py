"""Score the demo pipeline: generate held-out prompts, and read shape, colour and position from the images.

    python -m fxpass.tools.demo.measure [--prompts 64] [--size 128] [--write]

The reader is first checked on as many exact renderings of held-out scenes. `--write` puts the figures into the model
card, models/demo/README.md, between its two markers.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..checkout import DEMOS
from .scenes import Scene, draw_scene, read_things, render

Fact = tuple[str, str, str]


def fact(scene: Scene) -> Fact:
    """What the reader should find."""
    return scene.shape, scene.colour, scene.position


def score(wanted: list[Fact], found: list[list[Fact]]) -> dict[str, float]:
    """Shares of right images (the wanted object and nothing else), and of right shapes, colours and positions."""
    pairs = list(zip(wanted, found, strict=True))
    shares = {"picture": sum(have == [want] for want, have in pairs) / len(pairs)}
    for k, name in enumerate(("shape", "colour", "position")):
        shares[name] = sum(any(thing[k] == want[k] for thing in have) for want, have in pairs) / len(pairs)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEMOS["demo"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the figures into the model card")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(options.seed)
    scenes = [draw_scene(rng, held_out=True) for _ in range(options.prompts)]
    wanted = [fact(scene) for scene in scenes]
    exact = score(wanted, [read_things(render(s, options.size, options.size, rng)) for s in scenes])
    pipeline: Any = DiffusionPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    found: list[list[Fact]] = []
    began = time.time()
    for first in range(0, len(scenes), 8):
        pictures = pipeline(
            [s.caption for s in scenes[first : first + 8]],
            height=options.size,
            width=options.size,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=generator,
            output_type="np",
        ).images
        found += [read_things(picture) for picture in pictures]
    seconds = (time.time() - began) / len(scenes)
    for scene, want, have in zip(scenes, wanted, found, strict=True):
        if have != [want]:
            print(f"wrong: {scene.caption}\n   saw {have}")
    rows = [f"| {options.size}x{options.size} | reader | picture right | shape | colour | position | s per picture |"]
    rows += ["|" + " --- |" * 7, f"| {options.prompts} held-out prompts, {options.steps} steps, guidance "]
    rows[-1] += f"{options.guidance:g} | {exact['picture']:.1%} | "
    rows[-1] += " | ".join(f"{v:.1%}" for v in score(wanted, found).values()) + f" | {seconds:.1f} |"
    print("\n".join(rows))
    if options.write:
        card = options.folder / "README.md"
        marks = f"<!-- figures {options.size} -->", f"<!-- end {options.size} -->"
        body = "\n".join([marks[0], *rows, marks[1]])
        text, count = re.subn(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), body, card.read_text(), flags=re.S)
        if not count:
            raise SystemExit(f"{card} has no markers {marks}")
        card.write_text(text)


if __name__ == "__main__":
    main()
