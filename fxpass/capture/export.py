"""Capture by `torch.export`, non-strict: the model's own Python runs once on fake tensors."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export.graph_signature import InputKind, OutputKind

from ..ir.program import Program
from .call import Call, flatten_output


class CaptureError(RuntimeError):
    """The model cannot be turned into one graph; the message says which operator, where, and what to do."""


class _Flat(nn.Module):
    """The model as a function of flat tensors."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._call.rebuild(tensors)
        leaves, self.spec = flatten_output(self.model(*args, **kwargs))
        self.leaves = tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """Capture `model(*args, **kwargs)` as a `Program`. Weight-free (fake) models work.

    Raises `CaptureError` if the model is in training mode, changes its own state, or cannot be traced.
    """
    return capture_call(model, Call.of(model, args, kwargs))


def capture_call(model: nn.Module, call: Call) -> Program:
    """`capture` of a call that is already bound."""
    started = time.perf_counter()
    if any(module.training for module in model.modules() if isinstance(module, (nn.Dropout, nn.BatchNorm2d))):
        raise CaptureError("the model is in training mode (dropout would be captured); call model.eval() first")
    flat = _Flat(model, call)
    fake = detect_fake_mode([*model.parameters(), *call.tensors])
    with fake or nullcontext(), torch.no_grad():
        if fake is None:
            flat(*call.tensors)  # some models build tables at their first call
        exported = torch.export.export(flat, call.tensors, strict=False)
        exported = exported.run_decompositions({})
    return _program(exported, flat, call, time.perf_counter() - started)


def _program(exported: torch.export.ExportedProgram, flat: _Flat, call: Call, seconds: float) -> Program:
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model changes its own state while it runs: {spec.target} ({spec.kind.name})")
    weights: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    own = {name: name for name, _ in flat.named_parameters(remove_duplicate=False)}
    own |= {name: name for name, _ in flat.named_buffers(remove_duplicate=False)}
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        elif spec.target in own:
            weights[name] = str(spec.target).removeprefix("model.")
        else:
            constants[name] = exported.constants[str(spec.target)]
    graph = fx.Graph()
    results = graph.graph_copy(exported.graph, env := {})
    for old, new in env.items():
        value = old.meta.get("val")
        new.meta = {"val": value, "path": _path(old), "trace": old.meta.get("stack_trace", "")}
        if isinstance(value, Tensor):
            new.meta |= {"shape": tuple(value.shape), "dtype": value.dtype}
    graph.output(tuple(results))  # type: ignore[arg-type]
    return Program(
        graph, weights, constants, tuple(inputs), call.paths, flat.spec, flat.leaves, seconds={"capture": seconds}
    )


def _path(node: fx.Node) -> str:
    """The module that made a node, in the model's own names."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return path.removeprefix("model").removeprefix(".")
