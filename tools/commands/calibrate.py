"""`fxpass calibrate -o FILE`: measure this machine, for `--target FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write; '-' is standard output.")
    ],
    name: Annotated[str, typer.Option("--name", help="What the file shall call the device.")] = "this",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of a process on the CPU.")] = 1,
    link: Annotated[
        str | None,
        typer.Option("--link", metavar="NAME", help="The link between CUDA devices; that of CPUs is measured."),
    ] = None,
) -> None:
    """Measure a device, and the links between CPU processes; write them as a target: `fxpass plan --target FILE`."""
    import torch

    from ...ir.progress import progress
    from ...passes.targets import find
    from ...predict.calibrate import device_of, to_toml
    from ...predict.calibrate_links import links
    from .. import output as out

    out.check(output)
    if output != Path("-") and output.suffix != ".toml":
        raise ValueError(f"{output} does not end in .toml, by which --target tells a file from a name")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {device!r}: {str(error).partition(chr(10))[0]}") from None
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"a CPU and CUDA devices can be measured, not {device!r}")
    joined = find("H100", link or "nvlink4").link.name
    torch.set_num_threads(threads)
    found = {}
    if wanted.type == "cpu":
        with progress("measure links between two processes"):
            found = links()
    with progress(f"measure {device}"):
        measured = device_of(name, wanted, next(iter(found), joined))
    out.write(output, to_toml(measured, found))
