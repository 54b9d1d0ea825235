"""Bytes of a displaced step beside those of DistriFusion and PCPP, from plans of real models: docs/traffic.md.

    python -m fxpass.tools.sweeps.traffic [--write]

Bytes of DistriFusion and PCPP follow from the rules of their papers and code, applied to the shapes of our exchanges. A
DistriFusion rank receives all others' keys and values and, at each convolution that needs a neighbour's rows, the
border rows of all others, above and below (its first convolution slices its input). PCPP's code sends keys and values
whole; its paper's rule needs the nearest share p of each neighbour. Bytes are those that the busiest rank receives, at
2 bytes per number, for both guidance branches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from ...inspect.words import bytes_text
from ...ir.fetch import Fetch
from ...make_plan import plan
from ...models.resolve import Options, resolve
from ...plan import Plan
from ..checkout import ROOT

SIZES = (1024, 2048, 3840)
RANKS = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank receives at a displaced step."""

    keys_values: int
    halo: int
    rest: int


def ours(made: Plan) -> Traffic:
    """The traffic of a plan."""
    each = [made.bytes_received(rank, exact=False) for rank in range(made.world_size)]
    busiest = max(each, key=lambda roles: sum(roles.values()))
    rest = sum(n for role, n in busiest.items() if role not in ("keys_values", "halo", "output"))
    return Traffic(busiest.get("keys_values", 0), busiest.get("halo", 0), rest)


def distrifusion(made: Plan) -> Traffic:
    """The same model by DistriFusion's rules: n - 1 blocks of keys and values, and of two border sets per rank."""
    keys_values = halo = 0
    for exchange in made.exchanges:
        declared = exchange.declared
        if not isinstance(declared, Fetch) or declared.fresh != "stale":
            continue
        size = declared.dtype.itemsize
        row = torch.Size(declared.shape).numel() // declared.shape[declared.dim] * size
        if declared.role == "keys_values":
            keys_values += (declared.shape[declared.dim] - min(map(len, declared.have))) * row
        elif declared.role == "halo":
            border = max(declared.received(rank) for rank in range(made.world_size)) // row  # rows of both sides
            halo += (made.world_size - 1) * 2 * -(-border // 2) * row
    return Traffic(keys_values, halo, 0)


def table() -> list[str]:
    """The rows, as Markdown."""
    lines = [
        "| SDXL, 8 ranks | keys and values | DistriFusion's | halos | DistriFusion's | share | all else "
        "| keys and values, pcpp | share of DistriFusion's | keys and values, compressed | share of DistriFusion's |",
        "|" + " --- |" * 11,
    ]
    for size in SIZES:
        model = resolve("sdxl", Options(height=size, width=size, batch=2, dtype=torch.float16))
        displaced, narrow, coded = (
            plan(model.module, *model.args, world_size=RANKS, strategy=s, target="gpu", **model.kwargs)
            for s in ("displaced", "pcpp", "compressed")
        )
        mine, theirs = ours(displaced), distrifusion(displaced)
        fewer = [ours(each).keys_values for each in (narrow, coded)]
        rest = mine.rest / (mine.keys_values + mine.halo + mine.rest)
        cells = [
            f"{size}²", bytes_text(mine.keys_values), bytes_text(theirs.keys_values), bytes_text(mine.halo),
            bytes_text(theirs.halo), f"1/{theirs.halo / mine.halo:.1f}", f"{rest:.2%}",
            *(text for size in fewer for text in (bytes_text(size), f"{size / theirs.keys_values:.1%}")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/traffic.md")
    options = parser.parse_args()
    lines = table()
    print("\n".join(lines))
    if options.write:
        command = "    python -m fxpass.tools.sweeps.traffic --write"
        text = "\n".join(["# Bytes of a displaced step", "", command, "", *lines])
        (ROOT / "docs" / "traffic.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
