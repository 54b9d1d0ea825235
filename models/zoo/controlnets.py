"""ControlNets: what a control picture adds to a denoiser."""

from __future__ import annotations

from ..case import Case

CASES: tuple[Case, ...] = ()

LEFT_OUT: dict[str, str] = {}
