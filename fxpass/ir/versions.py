"""The versions that ranks and saved plans must share."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def versions() -> tuple[str, str]:
    """Of fxpass and of torch."""
    try:
        return version("fxpass"), str(torch.__version__)
    except PackageNotFoundError:  # Python runs it from a checkout
        return "not installed", str(torch.__version__)
