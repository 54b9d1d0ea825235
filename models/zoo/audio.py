"""Denoisers of sound, and of what else has one dim."""

from __future__ import annotations

from ..case import Case

CASES: tuple[Case, ...] = ()

LEFT_OUT: dict[str, str] = {}
