"""What each rank of test_one_rank.py runs: `python -m tests.models.one_rank_ranks tiny|real FOLDER`.

Writes what it saw to FOLDER/<rank>.json. The tiny pipeline is of this file, the real one is diffusers'.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxpass
from tests.runtime.plans import block

RANK = int(os.environ["RANK"])
IDS = torch.tensor([[1, 2, 3]])


class Text(nn.Module):
    """A text encoder, of which pipelines also call the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(10, 16)
        self.final_layer_norm = nn.LayerNorm(16)

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"states": self.final_layer_norm(self.encoder(input_ids))}


class NoisyText(Text):
    """It draws from torch's own generator, and from one among its arguments."""

    def forward(self, input_ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        states = super().forward(input_ids)["states"]
        return {"states": states + torch.rand(16) + torch.rand(16, generator=generator)}


class Scheduler:
    timesteps = torch.empty(0)

    def set_timesteps(self, count: int) -> None:
        self.timesteps = torch.linspace(0.9, 0.1, count)


class Pipe:
    """A pipeline of a text encoder and a denoiser."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.text_encoder = Text().eval()
        self.unet = block()
        self.scheduler = Scheduler()
        self._progress_bar_config: dict[str, Any] = {"leave": False}

    @torch.no_grad()
    def __call__(self, leave: bool = False) -> list[Tensor]:
        text = self.text_encoder(IDS.to(self.text_encoder.device))["states"]
        sample = torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(0)) + text.mean()
        self.scheduler.set_timesteps(3)
        for now in self.scheduler.timesteps:
            sample = sample - self.unet(sample, now[None])["sample"]
            if leave:
                raise KeyError("the user's own error")
        return [sample]

    def maybe_free_model_hooks(self) -> None:
        """What pipelines call last; hooks for offloading are set again there."""


class Both:
    """Two pipelines in one; their parts have the same names."""

    def __init__(self) -> None:
        self.base, self.refiner = Pipe(), Pipe()
        self.refiner.unet = block(1)

    def __call__(self) -> list[Tensor]:
        return [*self.base(), *self.refiner()]


def tiny() -> tuple[Any, Callable[[], list[Tensor]], Callable[[], Any]]:
    """A pipeline, a call of it, and one that the user's own error ends."""
    pipe = Pipe()
    return pipe, pipe, lambda: pipe(leave=True)


def real() -> tuple[Any, Callable[[], list[Tensor]], Callable[[], Any]]:
    from fxpass.models.pipelines_zoo.build import Small, build
    from fxpass.models.pipelines_zoo.recipe import Recipe

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyError("the user's own error")

    small = build("StableDiffusionPipeline")
    pipe: Any = small.pipeline
    pipe.set_progress_bar_config(leave=False)
    failing = Small(pipe, small.recipe | Recipe(call={"callback_on_step_end": lambda _: fail}))
    return pipe, small.run, failing.run


def attempt(action: Callable[[], Any], limit: float = 20) -> str:
    """The error that an action raises, and whether it took less than `limit` seconds."""
    start = time.monotonic()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__} after {f'<{limit} s' if time.monotonic() - start < limit else 'long'}: {error}"
    return "nothing"


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True))


def on_first(pipe: Any, run: Callable[[], list[Tensor]], leave: Callable[[], Any]) -> dict[str, Any]:
    """A pipeline whose text encoder has weights on rank 0 alone."""
    expected, encoder = run(), pipe.text_encoder
    width = encoder.final_layer_norm.weight.numel()
    hidden = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    normed = encoder.final_layer_norm(hidden)
    runs = [0]
    encoder.encoder.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    if RANK:
        encoder.to("meta")
    seen: dict[str, Any] = {}
    seen["unknown"] = attempt(lambda: fxpass.parallelize(pipe, on_first_rank=["text_encoder", "unet", "tokens"]))
    fxpass.parallelize(pipe, timeout=30, on_first_rank=True)
    seen["equal"] = [difference(run(), expected), difference([encoder.final_layer_norm(hidden)], [normed])]
    seen["runs"] = runs[0]
    seen["kind"] = type(pipe.text_encoder) is type(encoder)
    seen["unlike"] = attempt(lambda: encoder(IDS + RANK))
    seen["fails"] = attempt(lambda: encoder(IDS + 10**6))
    seen["again"] = difference(run(), expected)
    seen["bars"] = pipe._progress_bar_config.get("disable", False)
    # rank 1 leaves a picture, and begins the next one while rank 0 is in the middle
    if RANK:
        seen["left"] = attempt(leave)
    seen["lost"] = attempt(run)
    fxpass.parallelize(pipe, timeout=30, on_first_rank="text_encoder")
    seen["anew"] = difference(run(), expected)
    fxpass.restore(pipe)
    seen["restored bars"] = pipe._progress_bar_config
    seen["restored"] = ["forward" in vars(each) for each in encoder.modules()].count(True)
    seen["device"] = encoder.device.type
    return seen


def weights() -> dict[str, Any]:
    """A pipeline whose denoiser has weights on rank 0 alone, and whose text encoder has others on rank 1."""
    expected = Pipe()()
    pipe: Any = Pipe()
    if RANK:
        pipe.unet.to("meta")
        pipe.text_encoder.encoder.weight.data.zero_()
    fxpass.parallelize(pipe, timeout=30, weights_from_first_rank=True)
    seen: dict[str, Any] = {"equal": difference(pipe(), expected), "device": pipe.unet.conv_in.weight.device.type}
    fxpass.restore(pipe)
    both: Any = Both()
    expected = both()
    for each in (both.base, both.refiner) if RANK else ():
        each.unet.to("meta")
        each.text_encoder.to("meta")
    fxpass.parallelize(both, timeout=30, weights_from_first_rank=True, on_first_rank=True)
    seen["connected"] = fxpass.parallel(both.base.unet)._engine.executor._ranks.network is not None
    seen["both"] = attempt(lambda: seen.update(both_equal=difference(both(), expected)))
    del vars(both.base.text_encoder)["forward"]  # as hooks that are set again do
    both.base.maybe_free_model_hooks()
    seen["hooks"] = attempt(lambda: seen.update(hooks_equal=difference(both(), expected)))
    fxpass.restore(both)
    seen["restored"] = sum("forward" in vars(each.text_encoder) for each in (both.base, both.refiner))
    other = block()
    if RANK:
        other.conv_in.half()
    seen["unlike"] = attempt(lambda: fxpass.parallelize(other, timeout=30, weights_from_first_rank=True))
    return seen


def drawn() -> float:
    """A text encoder that draws random numbers, before the pipeline does."""
    pipe: Any = Pipe()
    torch.manual_seed(0)
    pipe.text_encoder = NoisyText().eval()

    @torch.no_grad()
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        text = pipe.text_encoder(IDS, generator)["states"]
        noise = torch.randn(1, 4, 16, 8) + torch.randn(1, 4, 16, 8, generator=generator)
        return [text, pipe.unet(noise, torch.tensor([0.5]))["sample"]]

    expected = run()
    fxpass.parallelize(pipe, timeout=30, on_first_rank=True)
    try:
        return difference(run(), expected)
    finally:
        fxpass.restore(pipe)


def main() -> None:
    torch.set_num_threads(1)
    kind, folder = sys.argv[1:]
    seen = {"drawn": drawn(), "on_first": on_first(*{"tiny": tiny, "real": real}[kind]()), "weights": weights()}
    Path(folder, f"{RANK}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
