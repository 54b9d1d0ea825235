"""Make a picture on several processes of this machine, from plain Python.

    python examples/plain.py FOLDER "a prompt" --ranks 2

FOLDER holds a diffusers pipeline, as `save_pretrained` writes it. This process is rank 0; the others start at the first
call and end with it.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

import fxpass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("prompt")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="picture.png")
    options = parser.parse_args()

    pipe = fxpass.parallelize(DiffusionPipeline.from_pretrained(options.folder), options.ranks)
    generator = torch.Generator().manual_seed(0)
    made = pipe(options.prompt, num_inference_steps=options.steps, generator=generator)
    made.images[0].save(options.output)
    fxpass.restore(pipe)  # ends the workers


if __name__ == "__main__":
    main()
