"""Every model of the small zoo is captured to a program that computes what the model does, on other inputs too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpass.capture import Call, broken_guard, capture
from fxpass.capture.evaluate import evaluate
from fxpass.ir.program import calls
from fxpass.models.small import Case, cases, output_tensors


@pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
def test_the_program_equals_the_model_on_fresh_inputs(case: Case) -> None:
    model = case.build()
    program = capture(model, **case.inputs(16, 2, module=model))
    fresh = case.inputs(16, 2, module=model, seed=7)
    call = Call.of(model, (), fresh)
    assert broken_guard(program, model, call.tensors) is None
    with torch.no_grad():
        expected = output_tensors(model(**fresh))
        found = output_tensors(evaluate(program, model, call))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    for node in calls(program.graph):
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node.format_node()


def test_a_fake_model_gives_the_same_graph_without_weights() -> None:
    case = cases[0]
    real = case.build()
    inputs = case.inputs(16, 2, module=real)
    with FakeTensorMode():
        fake = case.model().eval()
    programs = [capture(model, **inputs) for model in (real, fake)]
    first, second = ([str(node.target) for node in program.graph.nodes] for program in programs)
    assert first == second
