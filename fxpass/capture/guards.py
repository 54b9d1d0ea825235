"""Check whether a program fits a call: values that Python read at capture must be the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ir.program import Guard, Program
from .errors import GuardError
from .evaluate import bind, lookup, run_nodes


def plain(value: Any) -> Any:
    """A concrete result as hashable Python data."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), *value.flatten().tolist())
    return value


def shapes(value: Any) -> Any:
    """The shape of a tensor, or of each of several."""
    return tuple(value.shape) if isinstance(value, Tensor) else tuple(map(shapes, value))


def _holds(guard: Guard, program: Program, model: nn.Module, tensors: Sequence[Tensor]) -> bool:
    assert guard.graph is not None
    inputs = dict(zip(program.inputs, tensors, strict=True))
    result = run_nodes(guard.graph.nodes, bind(guard.graph, model, guard.weights, guard.constants, inputs))
    found = shapes(result) if guard.shape_only else plain(result)
    return type(found) is type(guard.value) and (
        found == guard.value or (found != found and guard.value != guard.value)
    )


def broken_guard(program: Program, model: nn.Module, tensors: Sequence[Tensor]) -> Guard | None:
    """The first guard whose value differs from capture, so that the call needs another program; None if all hold."""
    return next((guard for guard in program.guards if not _holds(guard, program, model, tensors)), None)


def outdated(program: Program, model: nn.Module) -> bool:
    """Whether Python state that the program depends on has changed since capture, so that the program is invalid.

    Such changes are a replaced tensor attribute, a constant that was written to, another global or closure.
    """
    if any(lookup(model, name) is not program.constants[place] for place, name in program.attributes.items()):
        return True
    return written(program) or (program.reads is not None and program.reads.changed())


def written(program: Program) -> bool:
    """Whether a constant that the program reads was written to since capture."""
    return any(version(program.constants[place]) != seen for place, seen in program.versions.items())


def version(tensor: Tensor) -> int:
    """The number of in-place changes; 0 for inference tensors, which have no count."""
    return 0 if tensor.is_inference() else tensor._version


def guard_error(guard: Guard) -> GuardError:
    """The error for a guard that fails at every call."""
    return GuardError(
        f"the model turns the input {guard.path!r} into the Python value {guard.value!r} at {guard.line}, "
        "and it differs at every call, so each call would need a new program; keep it a tensor there"
    )
