"""Diffusion transformers of videos."""

from __future__ import annotations

from ..case import Case

CASES: tuple[Case, ...] = ()

LEFT_OUT: dict[str, str] = {}
