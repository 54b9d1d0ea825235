"""The whole zoo is exact when split: a slice of it here, one case per kind of operators, and all of it with `-m slow`.

`make zoo` measures more of each case; this keeps what it found true.
"""

from __future__ import annotations

import pytest

from fxpass.capture import Call, CaptureError
from fxpass.models.zoo import CASES, zoo_case
from fxpass.tools.sweeps.zoo_case import CAPTURED, COLS, FRESH, ROWS, answer, blind, captured, split

SLICE = (
    "unet_1d",  # cubic filters, one dim
    "unet_2d_skip",  # filters of two dims, Fourier features
    "kandinsky_22",  # text and pixels in one attention
    "cascade_decoder",  # depthwise convolutions, global response norms, a second latent
    "uvit",  # codes, no picture
    "unidiffuser",  # one sequence of three kinds
    "t2i_adapter",  # pixels moved into channels, averages
    "controlnet_union",  # means over the picture
    "controlnet_sparse",  # frames
    "controlnet_qwen",  # complex rotations, a mask
    "controlnet_flux_hint",  # packing within the model
    "vq_decode",
    "dc_encode",
)


@pytest.mark.parametrize(
    "name", [pytest.param(case.name, marks=[] if case.name in SLICE else pytest.mark.slow) for case in CASES]
)
def test_a_case_is_exact(name: str) -> None:
    case = zoo_case(name)
    module = case.build()
    rows, cols = (max(case.multiple, size - size % case.multiple) for size in (ROWS, COLS))
    given, fresh = (case.inputs(rows, seed=seed, cols=cols, module=module) for seed in (CAPTURED, FRESH))
    try:
        subject = captured(module, given, fresh)
    except CaptureError:
        assert name not in SLICE
        return  # refused: nothing can be wrong
    assert not list(blind(subject.expected, answer(module, Call.of(module, (), given), subject.program)))
    for ranks in (2, 3):
        found = split(subject, ranks)
        assert found.exact or (found.refused and name not in SLICE), found
