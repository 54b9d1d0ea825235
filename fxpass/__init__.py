"""Make any diffusion denoiser patch-parallel."""

from .api import parallelize
from .capture import CaptureError, capture
from .ir.advice import FxpassWarning
from .ir.strategy import Strategy
from .logs import start as _start_logs
from .make_plan import FallbackError, Plan, plan
from .pipeline import parallel, restore
from .runtime.errors import DisagreementError, RankError

__all__ = [
    "CaptureError",
    "DisagreementError",
    "FallbackError",
    "FxpassWarning",
    "Plan",
    "RankError",
    "Strategy",
    "capture",
    "parallel",
    "parallelize",
    "plan",
    "restore",
]

_start_logs()
