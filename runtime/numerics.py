"""How torch computes in this process: precisions and kernels that users choose, which all ranks must share."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

_FLAGS = (
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.enabled",
    "cudnn.allow_tf32",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "mkldnn.enabled",
)
_PRECISIONS = ("cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision", "mkldnn.matmul.fp32_precision")
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
    try:
        found["matmul"] = torch.get_float32_matmul_precision()
        found |= {name: attrgetter(name)(torch.backends) for name in _FLAGS}
    except RuntimeError:  # the newer names of these choices are in use, which torch does not mix with the older ones
        found = {name: value for name, value in found.items() if name != "matmul" and name not in _FLAGS}
        found |= {name: attrgetter(name)(torch.backends) for name in _PRECISIONS}
        found |= {name: attrgetter(name)(torch.backends) for name in _FLAGS if "tf32" not in name}
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
