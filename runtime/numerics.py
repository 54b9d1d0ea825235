"""How torch computes in this process: precisions and kernels that users choose, which all ranks must share."""

from __future__ import annotations

from contextlib import suppress
from operator import attrgetter
from typing import Any

import torch

_FLAGS = (
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "mkldnn.enabled",
)
_PRECISIONS = tuple(  #: of float32, for each kind of operator
    f"{kind}.fp32_precision"
    for kind in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
)
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def numerics() -> dict[str, Any]:
    """The choices in this process, as `apply` takes them."""
    found: dict[str, Any] = {
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        **{f"{kind}_sdp": getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in _ATTENTION},
    }
    found |= {name: attrgetter(name)(torch.backends) for name in _FLAGS}
    with suppress(RuntimeError):  # where users set precisions by kind of operator, which these cannot express
        found["matmul"] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        found["cudnn.allow_tf32"] = torch.backends.cudnn.allow_tf32
    found |= {name: attrgetter(name)(torch.backends) for name in _PRECISIONS}  # last: the older settings change these
    return found


def apply(choices: dict[str, Any]) -> None:
    """Compute as another process does."""
    for name, value in choices.items():
        if name == "deterministic":
            torch.use_deterministic_algorithms(value[0], warn_only=value[1])
        elif name == "matmul":
            torch.set_float32_matmul_precision(value)
        elif name.endswith("_sdp"):
            getattr(torch.backends.cuda, f"enable_{name}")(value)
        else:
            holder, _, attribute = name.rpartition(".")
            setattr(attrgetter(holder)(torch.backends), attribute, value)
