"""What a pipeline holds beside its denoiser, as predictions of memory count it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.resolve import Options
    from ..predict.parts import Parts


def parts_of(model: str, options: Options) -> Parts | None:
    """The parts of the pipeline of `model`; None if it is none, or is not known. Arguments as of `resolve`."""
    from ..capture import capture
    from ..models.beside import beside
    from ..predict.parts import Parts
    from ..runtime.calls.module import OPERATORS

    held = beside(model, options)
    if held is None or held.decoder is None:
        return held and Parts(held.weights)
    made = held.decoder
    program = capture(made.module, *made.args, **made.kwargs)
    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    return Parts(held.weights, program, splits=operators <= OPERATORS)
