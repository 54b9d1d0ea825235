"""Find the inputs of a denoiser that change from step to step: sample and timestep. The others are conditioning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .program import Program, shape_of

TIMESTEP = re.compile(r"(^|[._])(t|ts|times?|timesteps?|sigmas?|noise_(levels?|labels?))(\.\d+)?$")
INDEX = re.compile(r"(\.\d+)+$")  #: at the end of a path: the place in a list


@dataclass(frozen=True)
class Moving:
    """The indices of the timestep and the sample among a program's inputs.

    Attributes:
        others: of inputs that say nothing about the conditioning: those that the program does not read; other items of
            the list that the sample is in (`x.1` beside `x.0`), if the outputs are such items, too; where a program is
            made of several parts (`Program.joined`), the timestep and the sample of the others (`part.sample` beside
            `denoiser.sample`); and what `Program.fed` names.
    """

    timestep: int
    sample: int
    others: frozenset[int] = frozenset()


def moving(program: Program) -> Moving | None:
    """Find timestep and sample by name and shape; None if no input looks like a timestep.

    The timestep's name matches `TIMESTEP`. It has at most one dim, or, if there is no such input, two: [batch, frames]
    or [batch, tokens]. The sample's shape is the nearest to that of the first output.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [nodes[name] for name in program.inputs]
    named = [i for i, path in enumerate(program.input_paths) if TIMESTEP.search(path)]
    times = [i for dims in ((0, 1), (2,)) for i in named if len(shape_of(inputs[i])) in dims]
    (output,) = program.graph.find_nodes(op="output")
    outputs: Sequence[Any] = tuple(output.args[0])
    if not times or not outputs:
        return None
    timestep, sample = times[0], _most_like(outputs[0], inputs)
    others = {i for i, node in enumerate(inputs) if program.input_paths[i] in program.fed or not node.users}
    names = [INDEX.sub("", path) for path in program.input_paths]
    items = [i for i, name in enumerate(names) if name == names[sample]]
    if len(outputs) >= len(items) and all(
        shape_of(inputs[i]) == shape_of(out) for i, out in zip(items, outputs, strict=False)
    ):
        others |= {*items}
    if program.joined:
        within = [name.partition(".")[2] for name in names]
        others |= {i for i, name in enumerate(within) if name and name in (within[timestep], within[sample])}
    return Moving(timestep, sample, frozenset(others - {timestep, sample}))


def moving_names(program: Program) -> set[str]:
    """The placeholders of the inputs that change from step to step; all inputs if that is unknown."""
    found = moving(program)
    if found is None:
        return set(program.inputs)
    return {program.inputs[i] for i in (found.timestep, found.sample, *found.others)}


def sampled_names(program: Program) -> set[str]:
    """The placeholders of the inputs that change from step to step, but for timesteps."""
    paths = dict(zip(program.inputs, program.input_paths, strict=True))
    return {name for name in moving_names(program) if not TIMESTEP.search(paths[name])}


def _most_like(output: fx.Node, inputs: Sequence[fx.Node]) -> int:
    """The input whose shape equals the output's in most dims."""
    wanted = shape_of(output)

    def likeness(i: int) -> tuple[bool, int, bool]:
        shape = shape_of(inputs[i])
        same = sum(a == b for a, b in zip(shape, wanted, strict=False))
        return len(shape) == len(wanted), same, inputs[i].meta["dtype"].is_floating_point

    return max(range(len(inputs)), key=likeness)
