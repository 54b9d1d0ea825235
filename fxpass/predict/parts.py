"""What a pipeline holds on each device beside its denoiser: encoders, autoencoder, and what a decode needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..ir.program import Program
from ..ir.strategy import Strategy
from ..passes import build
from ..passes.limits import WorldSizeError
from ..passes.targets import Target
from .prediction import Prediction, Steps


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline beside its denoiser. Every rank has their weights.

    Attributes:
        weights: bytes of the weights of each part, by name.
        decoder: one decode of the autoencoder, as captured; None if it is not known.
        splits: whether the ranks share a decode; else each runs a whole one.
    """

    weights: Mapping[str, int]
    decoder: Program | None = None
    splits: bool = True
    _decoding: dict[tuple[int, str], int] = field(default_factory=dict, repr=False)

    def decoding(self, world: int, target: Target) -> int:
        """Bytes of the activations of a decode, on the rank of `world` that needs most."""
        if self.decoder is None:
            return 0
        world = world if self.splits else 1
        key = world, target.name
        if key not in self._decoding:
            exact = Strategy()
            try:
                made = build(self.decoder, world, target, exact)
            except WorldSizeError:  # it runs unsplit then
                world = 1
                made = build(self.decoder, world, target, exact)
            self._decoding[key] = Steps.of(made.program, made.current, world, target).memory.activations
        return self._decoding[key]

    def with_memory(self, prediction: Prediction) -> Prediction:
        """A prediction of a denoiser, with the memory of the whole pipeline."""
        decoding = self.decoding(prediction.world, prediction.target)
        beside = dict(self.weights)
        memories = tuple(replace(each, beside=beside, decoding=decoding) for each in prediction.memories)
        return replace(prediction, memories=memories)
