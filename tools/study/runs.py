"""The runs of `fxpass study`: make images of fixed prompts and noise, unsplit or split; measure differences and bytes.

This works for any image pipeline of diffusers; only for the two demos a reader can tell whether an image is right.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...api import parallelize
from ...ir.strategy import Strategy
from ...models.pipelines import denoisers
from ...pipeline import parallel, restore
from ...plan import Plan
from ...runtime.calls.module import ParallelModule
from ..checkout import DEMOS, demo_folder
from ..commands.generate import load
from ..demo.measure import Fact, fact
from ..demo.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, TEXTURES, Scene, read_things
from ..pictures import psnr
from .results import Cell, Picture, StepError

CAP = 100.0  #: dB; higher PSNR, also of equal images, counts as this
GUIDANCE = 2.0  #: guidance scale of the demos


@dataclass(frozen=True)
class Prompt:
    """One image to make. The seed of its noise is its position in the list."""

    text: str  #: or the name of a class
    fact: Fact | None = None  #: what the reader should find; None without a reader


@dataclass(frozen=True)
class Subject:
    """A pipeline and the images that it makes."""

    name: str
    pipe: Any
    prompts: tuple[Prompt, ...]
    size: int  #: height and width in pixels
    guidance: float | None  #: None: the pipeline's own
    digest: str  #: hash of prompts, guidance and weights


@dataclass(frozen=True)
class Generation:
    """All images of one run, with latents and features."""

    pictures: np.ndarray  #: [prompts, H, W, 3] in 0..1
    latents: Tensor  #: after each step: [steps, prompts, ...]
    features: Tensor  #: features of the last latents in the unsplit denoiser: [prompts, ...]
    calls: int  #: denoiser calls per step: several if guidance branches are separate calls


@dataclass(frozen=True)
class Cost:
    """Bytes that a rank receives, at 2 bytes per floating-point number."""

    total: float
    exposed: float  #: awaited in the step that sent them, so that the link's time is not hidden


# ------------------------------------------------------------------------------------------------ what is asked for


def subject(name: str, count: int, size: int, prompt_file: Path | None = None) -> Subject:
    """A demo by name with its held-out scenes, or any diffusers folder with the lines of a file.

    Raises:
        ValueError: there is no such pipeline, too few prompts, or the pipeline makes images of another size.
    """
    folder = demo_folder(name) if name in DEMOS else Path(name)
    if prompt_file is not None and not prompt_file.is_file():
        raise ValueError(f"there is no file {prompt_file}; --prompt-file names a text file with one prompt per line")
    pipe = load(str(folder))
    if name not in DEMOS and prompt_file is None:
        raise ValueError(f"what should {name} draw? --prompt-file names a text file with one prompt per line")
    pipe.set_progress_bar_config(disable=True)
    known = held_out(classes=_by_class(pipe)) if prompt_file is None else _lines(prompt_file)
    if count > len(known):
        raise ValueError(f"there are only {len(known)} prompts for {name}; give --prompts {len(known)} or less")
    guidance = GUIDANCE if name in DEMOS else None
    chosen = tuple(known[:count])
    found = Subject(name, pipe, chosen, size, guidance, _digest(folder, chosen, guidance))
    if _by_class(pipe) and size != (own := _class_size(pipe)):
        raise ValueError(f"{name} makes images of {own} x {own} pixels only; give --size {own}")
    return found


def held_out(*, classes: bool) -> list[Prompt]:
    """The demos' held-out scenes, always in the same random order: captions, or names of classes."""
    if classes:
        from ..demo.train_dit import label, scenes

        texts = {scene: label(scene) for scene in scenes()}
    else:
        grammar = product(SHAPES, COLOURS, TEXTURES, POSITIONS, BACKGROUNDS)
        texts = {scene: scene.caption for scene in (Scene(*words) for words in grammar)}
    prompts = [Prompt(text, fact(scene)) for scene, text in texts.items() if scene.held_out]
    return [prompts[k] for k in np.random.default_rng(0).permutation(len(prompts))]


def _lines(path: Path) -> list[Prompt]:
    return [Prompt(line.strip()) for line in path.read_text().splitlines() if line.strip()]


def _by_class(pipe: Any) -> bool:
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def _class_size(pipe: Any) -> int:
    return pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def _digest(folder: Path, prompts: Sequence[Prompt], guidance: float | None) -> str:
    digest = hashlib.sha256(repr(([prompt.text for prompt in prompts], guidance)).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".json"):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:8]


# ------------------------------------------------------------------------------------------------ runs


@dataclass
class Record:
    """What is recorded of one call of a pipeline."""

    latents: list[Tensor] = field(default_factory=list)
    calls: int = 0
    last: inspect.BoundArguments | None = None  #: arguments of the denoiser's last call


@contextmanager
def recording(pipe: Any, stepped: Callable[[], None]) -> Iterator[Record]:
    """Record what the scheduler's steps return and how the denoiser is called; call `stepped` after each step."""
    record = Record()
    scheduler, model = pipe.scheduler, getattr(pipe, denoisers(pipe)[0])
    signature, plain = inspect.signature(model.forward), scheduler.step

    @functools.wraps(plain)  # pipelines look at its parameters
    def step(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        record.latents.append(result[0].clone())
        stepped()
        return result

    def called(model: nn.Module, args: Any, kwargs: Any) -> None:
        record.calls += 1
        record.last = signature.bind(*args, **kwargs)

    scheduler.step = step
    hook = model.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield record
    finally:
        hook.remove()
        del scheduler.step


def generate(subject: Subject, steps: int, batch: int, stepped: Callable[[], None]) -> Generation:
    """Make all images of a subject, `batch` per call of its pipeline."""
    pipe, size = subject.pipe, subject.size
    fixed: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    if subject.guidance is not None:
        fixed["guidance_scale"] = subject.guidance
    if not _by_class(pipe):
        fixed |= {"height": size, "width": size}
    parts = []
    for first in range(0, len(subject.prompts), batch):
        texts = [prompt.text for prompt in subject.prompts[first : first + batch]]
        asked = {"class_labels": pipe.get_label_ids(texts)} if _by_class(pipe) else {"prompt": texts}
        noise = [torch.Generator().manual_seed(first + k) for k in range(len(texts))]
        with recording(pipe, stepped) as record:
            pictures = pipe(**asked, **fixed, generator=noise).images
        latents = torch.stack(record.latents)[:, : len(texts)]  # some schedulers also step the guidance branches
        features = middle_features(getattr(pipe, denoisers(pipe)[0]), record, latents[-1])
        parts.append(Generation(np.asarray(pictures), latents, features, record.calls // len(latents)))
    return Generation(
        np.concatenate([part.pictures for part in parts]),
        torch.cat([part.latents for part in parts], 1),
        torch.cat([part.features for part in parts]),
        parts[0].calls,
    )


@torch.no_grad()
def middle_features(model: nn.Module, record: Record, latents: Tensor) -> Tensor:
    """Output of the unsplit denoiser's middle block for latents [B, ...], other inputs as in its last call.

    Distances of these features measure how different two images are (after Lin and Yang, "Diffusion Model with
    Perceptual Loss", 2023). No other network is needed, and the prompt is taken into account.
    """
    assert record.last is not None
    name = next(iter(record.last.arguments))
    branches = len(record.last.arguments[name]) // len(latents)
    record.last.arguments[name] = torch.cat([latents] * branches)
    outputs: list[Any] = []
    with middle(model).register_forward_hook(lambda block, args, output: outputs.append(output)):
        type(model).forward(model, *record.last.args, **record.last.kwargs)  # unsplit, also while it is parallel
    found = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    return found.unflatten(0, (branches, len(latents))).transpose(0, 1)


def middle(model: nn.Module) -> nn.Module:
    """The block between the down and the up blocks, or the middle one of the longest list of blocks."""
    if isinstance(block := getattr(model, "mid_block", None), nn.Module):
        return block
    blocks = max((part for part in model.children() if isinstance(part, nn.ModuleList)), key=len)
    return blocks[len(blocks) // 2]


@contextmanager
def split(pipe: Any, ranks: int, strategy: Strategy, warmup: int | None) -> Iterator[ParallelModule]:
    """Run the pipeline on several ranks of this process, and restore it after; yields what runs its main denoiser.

    The ranks are stages if the strategy lets these work at once, else patches.
    """
    stages = ranks if strategy.overlaps else 1
    try:
        parallelize(pipe, ranks, strategy=strategy, warmup_steps=warmup, executor="lockstep", stages=stages)
        yield parallel(getattr(pipe, denoisers(pipe)[0]))
    finally:
        restore(pipe)


# ------------------------------------------------------------------------------------------------ cost and quality


def costs(plan: Plan, steps: int) -> list[Cost]:
    """What each rank receives in `steps` calls of the denoiser; a plan in float32 is counted at half precision."""
    exact = steps if plan.exact_steps is None else min(steps, sum(plan.exact_steps))

    def received(rank: int, *, exposed: bool) -> float:
        first = plan.bytes_received(rank, exposed=exposed, half=True)
        later = plan.bytes_received(rank, exact=False, exposed=exposed, half=True)
        return exact * sum(first.values()) + (steps - exact) * sum(later.values())

    ranks = range(plan.world_size)
    return [Cost(received(rank, exposed=False), received(rank, exposed=True)) for rank in ranks]


def busiest(plan: Plan, steps: int) -> Cost:
    """The cost of the rank that receives most."""
    return max(costs(plan, steps), key=lambda cost: (cost.total, cost.exposed))


def compare(cell: Cell, prompts: Sequence[Prompt], found: Generation, whole: Generation) -> list[Picture]:
    """Compare each image of a split run with that of the unsplit run."""
    from skimage.metrics import structural_similarity

    latents = relative(found.latents[-1], whole.latents[-1], 1).tolist()
    features = relative(found.features, whole.features, 1).tolist()
    rows = []
    for k, prompt in enumerate(prompts):
        mine, theirs = found.pictures[k], whole.pictures[k]
        # with the window of Wang et al., "Image Quality Assessment" (2004)
        ssim: Any = structural_similarity(
            mine, theirs, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        right, right_unsplit = (
            None if prompt.fact is None else read_things(picture) == [prompt.fact] for picture in (mine, theirs)
        )
        decibels = min(psnr(mine, theirs), CAP)
        rows.append(Picture(cell, k, prompt.text, decibels, float(ssim), features[k], latents[k], right, right_unsplit))
    return rows


def step_errors(cell: Cell, found: Generation, whole: Generation) -> list[StepError]:
    """Compare the latents after every step with those of the unsplit run."""
    errors = relative(found.latents, whole.latents, 2).tolist()
    return [StepError(cell, k, i + 1, error) for i, row in enumerate(errors) for k, error in enumerate(row)]


def relative(found: Tensor, expected: Tensor, dims: int) -> Tensor:
    """||found - expected|| / ||expected|| for each element of the first `dims` dims."""
    difference, scale = ((found - expected).flatten(dims).double(), expected.flatten(dims).double())
    return difference.norm(dim=-1) / scale.norm(dim=-1)
