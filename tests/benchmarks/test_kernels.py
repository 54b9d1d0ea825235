"""Kernels of compiled steps are counted without compiling them."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import fxpass
from benchmarks.kernels import ceiling, in_segments, kernels
from fxpass.passes.codegen import segment_of, step_code
from fxpass.passes.lower_comm import StepPrograms
from tests.runtime.plans import block, inputs

aten = torch.ops.aten


@pytest.mark.parametrize("sums", [0, 2])
def test_what_fuses_is_one_kernel(sums: int) -> None:
    graph = fx.Graph()
    x = value = graph.placeholder("x")
    nodes = []
    for target in (aten.relu.default, aten.sin.default, *[aten.softmax.int] * sums):
        value = graph.call_function(target, (value, 1) if target is aten.softmax.int else (value,))
        nodes.append(value)
    found = kernels(segment_of(nodes, [x], [value]), [((64, 64), torch.float32)])
    assert found == 1 if not sums else found > 1


def test_a_displaced_step_has_more_kernels_than_one_without_exchanges() -> None:
    plan = fxpass.plan(block(), *inputs(), world_size=2, strategy="displaced")
    program = StepPrograms(plan.graph, 0)["steady"]
    assert in_segments(step_code(program, segmented=True)) > ceiling(program) > 5
