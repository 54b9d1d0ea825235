"""Count the kernels that exchanges cost a compiled displaced step: `python -m benchmarks.kernels small:unet_sdxl`.

Inductor's scheduler is asked for its kernels (on CPUs: loop nests, several of which are one function); nothing is
compiled or run. A steady step is counted segment by segment.
The *ceiling* is the same step in one graph without exchanges: what an exchange gives is an input, and what it is given
stays an output, else all that only feeds exchanges would be dropped.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering

import fxpass
from fxpass.ir import comm
from fxpass.ir.code import Segment, StepCode
from fxpass.ir.program import calls, exchanges_of
from fxpass.ir.step import StepProgram
from fxpass.models.resolve import Options, resolve
from fxpass.passes.codegen import segment_of, step_code
from fxpass.passes.lower_comm import StepPrograms
from fxpass.runtime.segments import compiled_segment


class _CountedError(Exception):
    """Raised in place of compiling what has been counted."""


def kernels(segment: Segment, inputs: Sequence[tuple[Any, torch.dtype]]) -> int:
    """The kernels of a segment for inputs of these shapes and dtypes, calls of libraries left out."""

    def stop(graph: GraphLowering) -> Any:
        graph.codegen()
        raise _CountedError

    metrics.reset()
    given = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in inputs]
    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compiled_segment(segment, given)
        except Exception as error:
            if not _caused_by_counting(error):
                raise
    return metrics.generated_kernel_count


def _caused_by_counting(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, _CountedError):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return error is not None


def in_segments(code: StepCode) -> int:
    """The kernels of all segments of a step; each distinct one is counted once."""
    places = Counter((place.segment, place.inputs) for place in code.places.values())
    return sum(times * kernels(code.segments[name], inputs) for (name, inputs), times in places.items())


def ceiling(program: StepProgram) -> int:
    """The kernels of a step without exchanges, in one graph."""
    graph = program.graph
    results = {node for node in calls(graph) if node.target in (comm.unpack, comm.estimate, comm.local)}
    aside = {comm.pack, comm.put, comm.get, comm.unpack, comm.estimate, comm.local, comm.witness, comm.forecast}
    needed: set[fx.Node] = set()
    (output,) = graph.find_nodes(op="output")
    made: list[fx.Node] = output.args[0][0]
    given = [node.all_input_nodes[0] for node in results]
    stack = [*made, *given]
    while stack:
        node = stack.pop()
        if node in needed or node in results or node.op == "placeholder":
            continue
        assert node.target not in aside, node.format_node()
        needed.add(node)
        stack += node.all_input_nodes
    nodes = [node for node in graph.nodes if node in needed]
    inside = set(nodes)
    inputs = list(dict.fromkeys(used for node in nodes for used in node.all_input_nodes if used not in inside))
    kept = {*made, *given} & inside
    outputs = [node for node in nodes if node in kept]
    segment = segment_of(nodes, inputs, outputs)
    return kernels(segment, [(node.meta["local_shape"], node.meta["dtype"]) for node in inputs])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("models", nargs="*", default=["small:unet_sdxl"], metavar="MODEL", help="as for `fxpass plan`")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--strategy", default="displaced")
    options = parser.parse_args()
    for name in options.models:
        found = resolve(name, Options())
        plan = fxpass.plan(
            found.module, *found.args, world_size=options.ranks, strategy=options.strategy, **found.kwargs
        )
        stale = sum(each[0].fresh != "sync" for _, each in exchanges_of(plan.graph))
        program = StepPrograms(plan.graph, options.ranks // 2)["steady"]
        steady, least = in_segments(step_code(program, segmented=True)), ceiling(program)
        extra = (steady - least) / max(stale, 1)
        print(
            f"{name}, {options.ranks} ranks, {options.strategy}: {steady} kernels in segments, {least} without "
            f"exchanges; {extra:.2f} for each of {stale} stale exchange nodes"
        )


if __name__ == "__main__":
    main()
