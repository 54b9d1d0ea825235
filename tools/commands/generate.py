"""`fxpass generate PIPELINE`: make a picture, a video or a sound on several ranks, and on request on one device too.

Under torchrun each process is a rank; only rank 0 writes and prints.
"""

from __future__ import annotations

import difflib
import inspect
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import StrategyName, rank

if TYPE_CHECKING:
    from rich.console import Console

    from ..media import Medium


DEFAULT_WORLD = 2  #: ranks, outside torchrun
SEEDS = (-(2**63), 2**64 - 1)  #: the least and the largest that torch takes
FRAMES = ("num_frames", "video_length")  #: what pipelines call the number of frames
SECONDS = ("audio_length_in_s", "audio_end_in_s", "audio_duration", "audio_duration_s", "duration")  #: of a sound


@dataclass(frozen=True)
class Request:
    """What to make; `None` means the pipeline's default."""

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    frames: int | None = None
    seconds: float | None = None  #: of a sound
    frame_rate: float | None = None  #: frames per second


@dataclass(frozen=True)
class Made:
    """A picture, a video or a sound (or a video with a sound), how long it took, and what was received."""

    media: list[Medium]
    seconds: float
    step_seconds: float | None  #: median of all steps but the first, in which the model is captured
    traffic: dict[str, int]  #: bytes that this rank received, by role

    def __str__(self) -> str:
        step = "" if self.step_seconds is None else f", {self.step_seconds:.3f} s for a step once it runs"
        return f"{self.seconds:.1f} s in all{step}"


Pipeline = Annotated[str, typer.Argument(metavar="PIPELINE", help="A diffusers folder or hub id.", show_default=False)]


def generate(
    pipeline: Pipeline,
    prompt: Annotated[str, typer.Option(help="What to draw.", show_default=False)],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    world_size: Annotated[
        int | None, typer.Option("--world-size", "-n", min=1, help="Ranks; 2 by default, under torchrun all of its.")
    ] = None,
    strategy: StrategyName = "sync",
    executor: Annotated[str, typer.Option(help="auto, spawn, distributed or lockstep.")] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    seed: Annotated[int, typer.Option(min=SEEDS[0], max=SEEDS[1], help="Seed of the initial noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames per second of a video.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Length of a sound.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            show_default=False,
            help="A .png, .mp4, .gif or .wav file; picture.png, video.mp4 (video.gif without ffmpeg) or sound.wav "
            "by default. A .png file of a video is animated.",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also make it on one device, and compare.")] = False,
) -> None:
    """Make a picture, a video or a sound from a prompt on several ranks: whatever the pipeline makes."""
    import torch.distributed as dist

    from ..console import console

    check_arguments(strategy, executor, output)
    out = console()
    pipe = load(pipeline, dtype, device_for(executor, world_size))
    request = Request(prompt, negative_prompt, steps, guidance, height, width, seed, frames, seconds, fps)
    world = world_size or int(os.environ.get("WORLD_SIZE", DEFAULT_WORLD))
    label = f"{world} rank{'s' if world > 1 else ''}"
    split, alone = make(pipe, request, world, strategy, executor, label, compare=compare)
    if rank() == 0:
        output = output or Path(split.media[0].kind)
        output.parent.mkdir(parents=True, exist_ok=True)
        written = write(split, alone, output, (f"{label}, {strategy}", "one device"), prompt)
        report(out, split, alone, label, written)
    if dist.is_initialized():
        dist.destroy_process_group()


def check_arguments(strategy: str, executor: str, output: Path | None) -> None:
    """Check the arguments before anything is loaded. Raises `ValueError`."""
    from ...api import EXECUTORS
    from ...planning import strategy_of
    from ...runtime import distributed
    from ..media import check_ending

    strategy_of(strategy)
    if executor not in EXECUTORS:
        near = difflib.get_close_matches(executor, EXECUTORS, n=1)
        raise ValueError(f"unknown executor {executor!r}; {_hint(near) or 'choose one of ' + ', '.join(EXECUTORS)}")
    if executor == "distributed" and not distributed.inside():
        raise ValueError(
            "--executor distributed needs a process for each rank: start them with `torchrun --nproc-per-node 2 -m "
            "fxpass.tools.cli generate …`, or use --executor spawn"
        )
    if output is not None:
        check_ending(output)


def device_for(executor: str, world_size: int | None) -> str:
    """The process's own GPU, for `spawn` the first one if there is one for each rank; else the CPU."""
    import torch

    from ...runtime import distributed

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if executor == "spawn" or (executor == "auto" and not distributed.inside() and world_size != 1):
        return "cuda:0" if torch.cuda.device_count() >= (world_size or DEFAULT_WORLD) else "cpu"
    return f"cuda:{local}" if local < torch.cuda.device_count() else "cpu"


def load(pipeline: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """Load the pipeline of a folder or hub id, without progress bars.

    Raises:
        ValueError: there is none, or no such dtype; the message suggests the nearest.
    """
    import torch
    from diffusers import DiffusionPipeline

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        near = difflib.get_close_matches(dtype, dtypes, n=1)
        raise ValueError(f"no dtype {dtype!r}; {_hint(near) or 'choose one of ' + ', '.join(dtypes)}")
    path = Path(pipeline)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"{path} is no pipeline: it has no model_index.json")
    elif path.exists():
        raise ValueError(f"{path} is a file; give the diffusers folder that holds model_index.json")
    elif pipeline.startswith((".", "/", "~")) or path.parent == Path() or path.parent.is_dir():
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
        near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, siblings, n=1)]
        raise ValueError(f"there is no folder {pipeline}; {_hint(near) or 'a hub id looks like owner/name'}")
    try:
        with _quiet():
            loaded = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=dtypes[dtype])
    except OSError as error:
        raise ValueError(f"cannot load {pipeline}: {str(error).strip().splitlines()[0]}") from error
    return loaded.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, notes and warnings while a pipeline is loaded; errors are still raised."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, verbosity in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                library.enable_progress_bar()


def make(
    pipe: Any, request: Request, world: int, strategy: str, executor: str, label: str, *, compare: bool
) -> tuple[Made, Made | None]:
    """Call the pipeline on `world` ranks and, on rank 0 if `compare`, on one device. Its models are restored."""
    from ... import parallel, parallelize, restore
    from ...models.pipelines import autoencoders, beside, denoisers, pipelines_in

    parallelize(pipe, world, strategy=strategy, executor=executor)
    try:
        places = [
            (each, name)
            for each in pipelines_in(pipe)
            for find in (denoisers, beside, autoencoders)
            for name in find(each)
        ]
        parts = {id(part): parallel(part) for part in (getattr(*place) for place in places)}
        split = run(pipe, request, label, list(parts.values()))
    finally:
        restore(pipe)
    return split, run(pipe, request, "one device") if compare and rank() == 0 else None


def run(pipe: Any, request: Request, label: str, modules: Sequence[Any] = ()) -> Made:
    """Call the pipeline once. Raises `ValueError` if it has no such argument."""
    import torch

    from ...ir.progress import progress
    from ..media import media_of

    takes = inspect.signature(pipe.__call__).parameters
    wanted = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "height": request.height,
        "width": request.width,
    }
    for value, names in ((request.frames, FRAMES), (request.seconds, SECONDS)):
        wanted[next((name for name in names if name in takes), names[0])] = value
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if request.frame_rate:
        given |= {name: request.frame_rate for name in ("frame_rate", "fps") if name in takes}
    if "class_labels" in takes:  # the prompt names a class
        given["class_labels"] = [class_of(pipe, given.pop("prompt"))]
    unknown = [name for name in given if name not in takes]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {' and no '.join(unknown)}")
    steps: list[float] = []

    def stepped(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(time.perf_counter())
        task.say("denoise", len(steps))
        return values

    if "callback_on_step_end" in takes:
        given["callback_on_step_end"] = stepped
    if "output_type" in takes:
        given["output_type"] = "np"
    pipe.set_progress_bar_config(disable=True)
    with progress(label, request.steps) as task:
        began = time.perf_counter()
        made = pipe(**given, generator=torch.Generator("cpu").manual_seed(request.seed))
        seconds = time.perf_counter() - began
    gaps = [b - a for a, b in pairwise(steps)]
    traffic: Counter[str] = Counter()
    for module in modules:
        traffic.update(module.traffic)
    return Made(
        media_of(pipe, made, request.frame_rate), seconds, statistics.median(gaps) if gaps else None, dict(traffic)
    )


def class_of(pipe: Any, name: str) -> int:
    """The number of the class that a class-conditional pipeline calls `name`.

    Raises:
        ValueError: it has no such class; the message suggests the nearest.
    """
    if name not in pipe.labels:
        near = difflib.get_close_matches(name, pipe.labels, n=1)
        raise ValueError(f"{type(pipe).__name__} has no class {name!r}; {_hint(near) or 'see its `labels`'}")
    return pipe.labels[name]


def write(split: Made, alone: Made | None, output: Path, labels: tuple[str, str], heading: str) -> list[Path]:
    """Write what was made, to FILE with the ending of its kind.

    If there is something to compare, write that to FILE-one-device, and two pictures (of videos the frames in the
    middle) with their difference to FILE-comparison.png.
    """
    from ..media import save
    from ..pictures import comparison

    written = save(split.media, output)
    if alone is None:
        return written
    written += save(alone.media, output.with_stem(f"{output.stem}-one-device"))
    left, right = alone.media[0].picture, split.media[0].picture
    if left is not None and right is not None:
        written.append(output.with_name(f"{output.stem}-comparison.png"))
        comparison(left, right, (labels[1], labels[0]), heading).save(written[-1])
    return written


def report(out: Console, split: Made, alone: Made | None, label: str, written: list[Path]) -> None:
    """Print seconds, bytes by role, the difference, and the files."""
    from ...inspect.words import bytes_text

    if alone is not None:
        out.print(f"one device  {alone}")
    out.print(f"{label:<11} {split}")
    roles = ", ".join(f"{role} {bytes_text(n)}" for role, n in sorted(split.traffic.items(), key=lambda i: -i[1]) if n)
    out.print(f"exchanged   rank 0 received {bytes_text(sum(split.traffic.values()))}: {roles or 'nothing'}")
    if alone is not None:
        differences = [one.difference(other) for one, other in zip(alone.media, split.media, strict=True)]
        out.print(f"difference  {', '.join(differences)}", style="bold")
    out.print(f"written     {', '.join(map(str, written))}", soft_wrap=True)


def _hint(near: list[str]) -> str:
    return f"did you mean {near[0]}?" if near else ""
