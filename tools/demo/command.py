"""`make demo`: make an image from a prompt on two processes, and again on one device.

It writes both images, and one that shows them beside their amplified difference, and prints seconds, PSNR and bytes
exchanged. The pipeline was trained for this; its weights are in a clone of the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkout import demo_folder
from ..console import Command

PROMPT = "a blue circle on the right, white background"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def demo(
    prompt: Annotated[str, typer.Option(help="Shapes, colours, positions and a background.")] = PROMPT,
    world_size: Annotated[int, typer.Option("--world-size", "-n", min=1, help="Processes.")] = 2,
    size: Annotated[int, typer.Option(min=32, help="Height and width in pixels.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Where the three images go.")] = Path("out"),
    pipeline: Annotated[Path | None, typer.Option(help="Another pipeline's folder.", show_default=False)] = None,
) -> None:
    """Make an image from a prompt on several processes and on one device, and compare."""
    from ..commands.generate import Request, load, make, report, write
    from ..console import console

    out = console()
    out.print(f'"{prompt}"', style="bold")
    folder = pipeline or demo_folder("demo")
    request = Request(prompt, None, steps, guidance, size, size, seed)
    label = f"{world_size} process{'es' if world_size > 1 else ''}"
    out.print("the first step takes longest: the model is captured and split, and the processes start", style="dim")
    split, alone = make(load(str(folder)), request, world_size, "sync", "spawn", label, compare=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    written = write(split, alone, output_dir / "picture.png", (label, "one device"), prompt)
    report(out, split, alone, label, written)
