"""Make a picture on all processes that torchrun starts, one for each GPU.

    torchrun --nproc-per-node 2 examples/with_torchrun.py FOLDER "a prompt"

Every rank runs this script and gets the same picture; rank 0 saves it. On CPUs it works as well.
"""

from __future__ import annotations

import argparse
import os

import torch
from diffusers import DiffusionPipeline

import fxpass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="picture.png")
    options = parser.parse_args()

    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    pipe = fxpass.parallelize(DiffusionPipeline.from_pretrained(options.folder).to(device))
    pipe.set_progress_bar_config(disable=rank > 0)
    generator = torch.Generator().manual_seed(0)  # equal noise on every rank
    made = pipe(options.prompt, num_inference_steps=options.steps, generator=generator)
    if rank == 0:
        made.images[0].save(options.output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
