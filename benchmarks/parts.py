"""`make bench-parts`: exact parts of a pipeline against their ceilings, on two one-thread ranks.

    python -m benchmarks.parts [--rounds 10] [--parts guidance patches decode]

    guidance    a UNet of batch 2, as guidance makes it, with a group of one rank for each sample (`cfg=2`)
    patches     the same with two patches of both samples
    decode      the decoder of an autoencoder, with two patches

Each alternates with its ceiling: the same program without exchanges, on messages kept from an earlier step. The report
has medians per step, the ratio of each round, and the bytes received. With `FXPASS_SHM_DISABLE=1` gloo carries
messages.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import fxpass
from benchmarks.harness import Contender, Stepper, heading, in_rounds, on_two_processes, ratio, spread
from benchmarks.models import unet
from fxpass.ir.step import EXACT
from fxpass.models.wrappers import Decode
from fxpass.runtime.distributed import DistributedExecutor

STEPS = 1  #: timed steps per turn, after an untimed one


def guided() -> tuple[nn.Module, dict[str, Any]]:
    """The UNet with both branches of guidance in a batch."""
    model, inputs = unet()
    return model, inputs | {
        name: torch.randn(2, *inputs[name].shape[1:]) for name in ("sample", "encoder_hidden_states")
    }


def decoder() -> tuple[nn.Module, dict[str, Any]]:
    """A decoder of about 12 M parameters, 64x64 latent."""
    from diffusers import AutoencoderKL

    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes: Any = {"block_out_channels": (64, 128, 256), "layers_per_block": 1, "latent_channels": 4}
    model: Any = AutoencoderKL(**sizes, **blocks)
    return Decode(model), {"latent": torch.randn(1, 4, 64, 64)}


#: the model, how it is planned, and the least share of its ceiling
PARTS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "guidance": (guided, {"cfg": 2}, 0.97),
    "patches": (guided, {}, 0.9),
    "decode": (decoder, {}, 0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="exact parts of a pipeline against their ceilings")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    on_two_processes("benchmarks.parts", (measure(name, options.rounds) for name in options.parts))


@torch.no_grad()
def measure(name: str, rounds: int) -> str:
    """Run a part and its ceiling in turns; returns the report."""
    make, chosen, aim = PARTS[name]
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    plan = fxpass.plan(fxpass.capture(model, **inputs), world_size=2, **chosen)
    ready = Stepper(DistributedExecutor(2), plan, model, inputs)
    received = ready.received(ready.exact)
    running = {"exact": Contender(ready.exact), "ceiling": Contender(ready.without_exchanges(EXACT))}
    seconds = in_rounds(running, rounds, STEPS)
    lines = [
        heading(name, model, f"{plan.arrangement}, {rounds} rounds of {STEPS} steps, medians (min–max) in seconds")
    ]
    lines += [f"  {key:<8} {spread(values)}" for key, values in seconds.items()]
    lines.append(f"  ceiling / exact   {ratio(seconds['ceiling'], seconds['exact'])}   aim: at least {aim}")
    roles = ", ".join(f"{role} {count / 1e6:.3f} MB" for role, count in received.items())
    lines.append(f"  received per rank and step: {roles}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
