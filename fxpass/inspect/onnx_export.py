"""Write the step program of a rank as an ONNX file; `docs/inspect.md` says what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..capture.structure import WeightTable
from ..ir.program import Program
from ..ir.step import MODES, Mode
from ..passes.lower_comm import StepPrograms
from .exchanges import message_ids
from .files import replacing
from .record import Snapshot
from .store import to_json

if TYPE_CHECKING:
    import onnx_ir as ir


def check_onnx() -> None:
    """Raises `MissingExtraError` unless everything that an export needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        from ..extras import missing

        raise missing(error) or error from None


def check_weights(path: Path, weights: str | None) -> None:
    """Raises `ValueError` unless `weights` is None, or names another file in the folder of the model at `path`.

    A model finds its weights by their name in its own folder.
    """
    if weights is None:
        return
    if weights in ("", "..") or Path(weights).name != weights:
        raise ValueError(f"the weights lie in the folder of the model; give the name of a file, not {weights!r}")
    if weights == path.name:
        raise ValueError(f"the model and its weights cannot both be the file {weights!r}; give another name")


def write_onnx(
    program: Program,
    graph: fx.Graph,
    snapshot: Snapshot,
    path: Path,
    mode: Mode = "exact",
    *,
    model: nn.Module | None = None,
    weights: str | None = None,
) -> None:
    """Write the step program of a mode of the rank of `snapshot`.

    Args:
        program: the normalized program on whole tensors.
        graph: the scheduled graph for all ranks.
        snapshot: of the same graph; its exchanges become metadata of the file.
        model: its weights are written to the file `weights` beside `path`, which is the same for all ranks; None:
            weights are inputs.
        weights: default: `weights-DIGEST.bin`, so that models with other weights can lie in the same folder.

    Raises:
        ValueError: there is no such mode, the weights of `model` have no values, or `weights` is no name of another
            file in the folder of `path`.
        OnnxError: an operator has no ONNX form.
        MissingExtraError: onnx or onnxscript is not installed.
        OSError: a file cannot be written.
    """
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r} of a step; there is: {', '.join(MODES)}")
    check_weights(path, weights)
    check_onnx()
    import onnx
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    from .onnx_model import Names, step_models

    programs = StepPrograms(graph, snapshot.rank)
    step = programs[programs.canonical(mode)]
    labels = program.weights | dict(zip(program.inputs, program.input_paths, strict=True))
    given = {name: value for name, value in program.constants.items() if not isinstance(value, FakeTensor)}
    if model is not None:
        given |= zip(program.weights, WeightTable(model, list(program.weights.values())).tensors(), strict=True)
        if any(isinstance(given[name], FakeTensor) for name in program.weights):
            raise ValueError("the weights of the model have no values; leave out `model`, and they are inputs")
    tensors: dict[str, ir.TensorProtocol] = {
        name: TorchTensor(value, labels.get(name)) for name, value in given.items()
    }
    names = Names(labels, message_ids(graph, programs.channels), program.modules)
    (made,) = step_models([step], names, tensors)
    made.metadata_props.update({"fxpass.mode": step.mode, "fxpass.dump": to_json(replace(snapshot, nodes=()))})
    if model is not None:
        held = [tensors[name] for name in program.weights]
        outside = _save(held, path.parent / (weights or f"weights-{_digest(held)}.bin"))
        for value in made.graph.initializers.values():
            value.const_value = outside.get(value.const_value, value.const_value)
    with replacing(path) as part:
        ir.save(made, part, format="protobuf")
        onnx.checker.check_model(str(part))


def _digest(tensors: Sequence[ir.TensorProtocol]) -> str:
    """Tells apart what files of weights hold: the names of the tensors, their kinds and their bytes."""
    found = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        found.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()


def _save(tensors: Sequence[ir.TensorProtocol], path: Path) -> dict[Any, ir.TensorProtocol]:
    """Write tensors to a file; returns what stands for each of them in models in the same folder."""
    import onnx_ir as ir

    with replacing(path) as part:
        written = ir.external_data.convert_tensors_to_external(tensors, part.parent, part.name)
    return {
        tensor: ir.ExternalTensor(
            path.name, each.offset, each.length, each.dtype, shape=each.shape, name=each.name, base_dir=path.parent
        )
        for tensor, each in zip(tensors, written, strict=True)
    }
