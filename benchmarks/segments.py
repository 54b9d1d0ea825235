"""How many segments compile=True would compile, counted without weights: `python -m benchmarks.segments sdxl flux-dev`.

A segment lies between two puts or gets. Equal segments whose inputs have equal shapes and dtypes are compiled once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import fxpass
from fxpass.ir.step import Mode
from fxpass.models.catalog import load
from fxpass.passes.codegen import step_code
from fxpass.passes.lower_comm import StepPrograms


@dataclass(frozen=True)
class Segments:
    """The segments of one mode of one rank."""

    places: int  #: calls of a segment in a step
    distinct: int


def count(programs: StepPrograms, mode: Mode) -> Segments:
    """Count the segments of a mode."""
    code = step_code(programs[mode], segmented=True)
    places = code.places.values()
    return Segments(len(places), len({(place.segment, place.inputs) for place in places}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segments", description=__doc__)
    parser.add_argument("names", nargs="*", default=["sdxl", "flux-dev"], metavar="NAME", help="catalog entries")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--strategy", default="displaced")
    options = parser.parse_args()
    for name in options.names:
        model, inputs = load(name)
        plan = fxpass.plan(model, world_size=options.ranks, strategy=options.strategy, **inputs)
        state = max(plan.state_bytes_per_rank) / 1e9
        print(f"{name}, {options.ranks} ranks, {options.strategy}: state of a rank up to {state:.2f} GB")
        for rank in sorted({0, options.ranks // 2}):
            programs = StepPrograms(plan.graph, rank)
            asked: tuple[Mode, ...] = ("exact", "first", "steady")
            modes: dict[Mode, None] = dict.fromkeys(programs.canonical(mode) for mode in asked)
            for mode in modes:
                found = count(programs, mode)
                print(f"  rank {rank}, {mode} steps: {found.places} segments, {found.distinct} distinct")


if __name__ == "__main__":
    main()
