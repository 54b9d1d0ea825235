"""How a small pipeline differs from what the general construction would make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OMIT = object()  #: as an argument of the call: leave it to the pipeline's default


@dataclass(frozen=True)
class Part:
    """A part that the general construction would not choose.

    Attributes:
        case: the case of the zoo that has its model; by default the first one of its class.
        kind: its class by name, in place of the one that the pipeline's signature gives first.
        width: channels of an encoder; by default what the denoiser takes.
        options: entries of its configuration.
    """

    case: str = ""
    kind: str = ""
    width: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The differences of one pipeline class, or of a family, from the general construction.

    Attributes:
        parts: by name: a `Part`; a dict, for options; an int, for the width of an encoder; a function of the `Parts`
            that are there, which returns the part; anything else, for the part itself.
        call: arguments that differ, by name; functions are called with the pipeline.
        constants: names of the pipeline's module, or of the pipeline, that get other values: sizes that it insists on.
        left_out: why the pipeline is not built: the missing package or download.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""

    def __or__(self, other: Recipe) -> Recipe:
        """Both; the other wins."""
        constants = {**self.constants, **other.constants}
        reason = other.left_out or self.left_out
        return Recipe({**self.parts, **other.parts}, {**self.call, **other.call}, constants, reason)


def left_out(reason: str) -> Recipe:
    return Recipe(left_out=reason)
