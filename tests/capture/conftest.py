"""Every refusal that a test here provokes must leave the model as it was."""

import sys
from typing import Any

import pytest
from torch import nn

from fxpass.capture import Call
from fxpass.ir.program import Program
from fxpass.runtime.calls.engine import Engine
from tests.capture.unchanged import unchanged_if_refused


@pytest.fixture(autouse=True)
def refusals_leave_models_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the model's tensors around each capture, and around each call of a parallel module."""
    capture: Any = sys.modules["fxpass.capture.capture"]
    capture_call, run = capture.capture_call, Engine.__call__

    def checked_capture(model: nn.Module, call: Call) -> Program:
        with unchanged_if_refused(model):
            return capture_call(model, call)

    def checked_call(engine: Engine, *args: Any) -> Any:
        with unchanged_if_refused(engine.model):
            return run(engine, *args)

    monkeypatch.setattr(capture, "capture_call", checked_capture)
    monkeypatch.setattr(Engine, "__call__", checked_call)
