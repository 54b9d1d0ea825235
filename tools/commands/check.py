"""`fxpass check MODEL`: run a model whole and split, compare the outputs, and say whether splitting is exact."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import inf, isnan
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Batch, Frames, Height, Model, Strict, Width

if TYPE_CHECKING:
    import torch
    from torch import nn

LARGEST = 1_000_000_000  #: a catalog model with more parameters is not run


@dataclass(frozen=True)
class Difference:
    """One output of a split run, compared with the unsplit model's."""

    world_size: int
    output: str  #: its name in the model's output
    shape: tuple[int, ...]
    value: float  #: max abs difference / max abs
    fallbacks: int
    bound: float  #: the speed-up that the slowest rank's work allows


def check(
    model: Model,
    world_size: Annotated[
        list[int], typer.Option("--world-size", "-n", min=1, help="Ranks; may be given several times.")
    ] = [2, 3],  # noqa: B006
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference that counts as exact.")] = 1e-5,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep constant parameters (whose values are all equal) as they are.")
    ] = False,
    strict: Strict = False,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    batch: Batch = None,
) -> None:
    """Say whether a model is exact when split, by running it (in float32). Exits with 1 if not.

    The model is captured with one set of inputs and compared on another. Constant parameters (zero gates, unit norms)
    get random values first, because an error that is multiplied by zero does not show.
    """
    import torch

    from ...models.resolve import Options, resolve
    from ..console import console

    refuse_large(model)
    resolved = resolve(model, Options(height, width, frames, batch, torch.float32, fake=False))
    module = resolved.module.eval()
    changed = 0 if keep_weights else randomised(module)
    found = differences(module, resolved.args, resolved.kwargs, world_size, strict=strict)
    out = console()
    out.print(_table(found, tolerance))
    if changed:
        out.print(f"{changed} constant parameters were given random values; --keep-weights leaves them", style="dim")
    worst = max(each.value for each in found)
    exact = worst <= tolerance
    verdict = "exact" if exact else "NOT exact"
    out.print(
        f"{'yes' if exact else 'no'}: {model} is {verdict} on {', '.join(map(str, world_size))} ranks "
        f"(largest difference {worst:.1e}, {tolerance:.0e} is allowed)",
        style="bold green" if exact else "bold red",
    )
    raise typer.Exit(0 if exact else 1)


def differences(
    module: nn.Module, args: Any, kwargs: Any, world_sizes: Sequence[int], *, strict: bool = False
) -> list[Difference]:
    """Compare every output on each number of ranks with the unsplit module's, on other inputs than the example's.

    Raises:
        ValueError: the ranks are too many, with `strict` an operator cannot be split, or the module's own output is not
            finite.
    """
    import torch

    from ... import parallelize
    from ...ir.progress import progress

    again_args, again_kwargs = fresh(args, kwargs)
    with torch.no_grad():
        expected = named_tensors(module(*again_args, **again_kwargs))
    for name, value in expected.items():
        if not value.isfinite().all():
            raise ValueError(f"{name or 'the output'} of the unsplit model is not finite, so there is nothing to check")
    results = []
    for world in world_sizes:
        with progress(f"run on {world} ranks"):
            split: Any = parallelize(module, world, executor="lockstep", strict=strict)
            split(*args, **kwargs)
            found = named_tensors(split(*again_args, **again_kwargs))
            plan = split.plan
            split.close()
        for name, value in expected.items():
            difference = _relative(found[name], value)
            results.append(Difference(world, name, tuple(value.shape), difference, len(plan.gathered), plan.bound))
    return results


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if isnan(difference):
        return inf
    return difference / scale if scale else difference


def fresh(args: Any, kwargs: Any, seed: int = 1) -> Any:
    """Other values in the same range: tensors are shuffled, numbers above 1 are halved.

    Masks (tensors of zeros and ones, or of minus infinities) stay as they are.
    """
    import torch
    from torch.utils import _pytree as pytree

    generator = torch.Generator().manual_seed(seed)

    def other(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or value.is_complex() or not value.numel():
            return value
        if not value.is_floating_point():
            return value // 2 if value.max() > 1 else value
        if torch.equal(value, value.round()):
            return value
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.flatten()[order].reshape(value.shape) * (0.9 if value.numel() == 1 else 1)

    return pytree.tree_map(other, (args, kwargs))


def named_tensors(output: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an output by name: "sample", "0.1", or "" if the output is one tensor."""
    import torch

    if isinstance(output, torch.Tensor):
        return {name: output}
    if isinstance(output, Mapping):  # the outputs of diffusers are mappings, too
        parts = [(str(key), value) for key, value in output.items()]
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    elif isinstance(output, (list, tuple)):
        parts = [(str(i), value) for i, value in enumerate(output)]
    else:
        return {}
    prefix = f"{name}." if name else ""
    return {key: tensor for part, value in parts for key, tensor in named_tensors(value, f"{prefix}{part}").items()}


def randomised(module: nn.Module) -> int:
    """Give random values to constant parameters; returns how many there were."""
    from ...models.small import randomise_constants

    before = [parameter._version for parameter in module.parameters()]
    randomise_constants(module)
    return sum(p._version != version for p, version in zip(module.parameters(), before, strict=True))


def refuse_large(model: str) -> None:
    """Raises `ValueError` if `model` is a catalog name or a folder whose weights do not fit this machine's memory."""
    from ...models.catalog import catalog
    from ...models.resolve import Options, resolve

    if ":" in model:
        return  # a factory has allocated its module before its size is known
    name = model if model in catalog else ""
    count = catalog[name].parameters if name else 0
    if not name:
        count = sum(p.numel() for p in resolve(model, Options(fake=True)).module.parameters())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (name and count > LARGEST) or 6 * count > free:  # float32, and half as much again for the values
        hint = f"; take its small sibling instead: {_sibling(name)}" if name else ""
        raise ValueError(
            f"{model} has {count / 1e6:,.0f} M parameters: too large to run whole and split on this machine "
            f"({free / 1e9:.1f} GB are free){hint}"
        )


def _sibling(name: str) -> str:
    """The small model of the same class with the nearest name."""
    import difflib

    from ...models.catalog import catalog
    from ...models.small import cases

    entry = catalog[name]
    wanted = (entry.wrap or entry.model).__name__
    same = [case.name for case in cases if type(case.build()).__name__ == wanted]
    return "small:" + max(same, key=lambda each: difflib.SequenceMatcher(None, each, name).ratio())


def _table(found: list[Difference], tolerance: float) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("ranks", "output", "shape", "max difference / max", "exact", "at most", "fallbacks"):
        table.add_column(heading)
    for each in found:
        exact = "yes" if each.value <= tolerance else "NO"
        table.add_row(
            str(each.world_size),
            each.output or "output",
            "x".join(map(str, each.shape)),
            f"{each.value:.1e}",
            exact,
            f"{each.bound:.2f} times as fast",
            str(each.fallbacks or "none"),
            style=None if exact == "yes" else "red",
        )
    return table
