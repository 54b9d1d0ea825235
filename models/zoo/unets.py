"""UNets, and other denoisers of pictures that are no transformers."""

from __future__ import annotations

from ..case import Case

CASES: tuple[Case, ...] = ()

LEFT_OUT: dict[str, str] = {}
