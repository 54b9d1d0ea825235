"""The models of this folder with inputs: `outsiders` is the list that the tests go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpass.models.case import randomise_constants

from .adm import ADM
from .audio import AudioUNet
from .consistency import ConsistencyModel
from .experts import MixtureDiT
from .hourglass import Hourglass, Level
from .linear_attention import Conditioning, LinearDenoiser
from .medical import MedicalUNet
from .rearranged import RearrangedDiT
from .uvit import UViT


@dataclass(frozen=True)
class Given:
    """How many rows and samples a call has, and where its random values come from."""

    rows: int
    batch: int
    generator: torch.Generator

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.generator)

    def pick(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, (self.batch, *shape), generator=self.generator)


Call = tuple[tuple[Any, ...], dict[str, Any]]  #: positional arguments, and those by name


@dataclass(frozen=True)
class Outsider:
    """One model, which is made for a number of rows, and a call of it."""

    name: str
    model: Callable[[int], nn.Module]
    call: Callable[[Given], Call]
    rows: int = 32
    odd: int = 27  #: rows that ranks cannot share out evenly, and strides do not divide where the model allows that

    def build(self, rows: int) -> nn.Module:
        """In eval mode, parameters that are constant at first made random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.model(rows)
        return randomise_constants(module).eval().requires_grad_(False)

    def arguments(self, rows: int, batch: int = 2, seed: int = 0) -> Call:
        return self.call(Given(rows, batch, torch.Generator().manual_seed(seed)))


def _adm(given: Given) -> Call:
    return (given.randn(3, given.rows, 16), given.pick(1000), given.pick(5)), {}


def _uvit(given: Given) -> Call:
    return (given.randn(4, given.rows, 16), given.rand() * 999), {"y": given.pick(7)}


def _rearranged(given: Given) -> Call:
    mask = torch.arange(9) < 5 + given.pick(5)[:, None]
    batch = {"image": given.randn(3, given.rows, 12), "sigma": given.rand() + 0.1, "text": given.randn(9, 12)}
    return (batch | {"mask": mask, "prompt": "a dog", "seed": None},), {"guidance_scale": 1.5, "prediction": "eps"}


def _unconditional(given: Given) -> Call:
    return ({"image": given.randn(3, given.rows, 12), "sigma": given.rand() + 0.1},), {}


def _hourglass(given: Given) -> Call:
    return (given.randn(3, given.rows, 12), given.rand() + 0.1, None), {"class_cond": given.pick(3)}


def _medical(given: Given) -> Call:
    volume, prior = given.randn(1, 6, given.rows, 12), given.randn(1, 6, given.rows, 12)
    return (volume, given.pick(1000), prior), {"features": True}


def _final(given: Given) -> Call:
    return (given.randn(2, 6, given.rows, 12),), {"timestep": given.pick(1000), "mode": "final"}


def _audio(given: Given) -> Call:
    size = given.rows * 8 + given.rows % 2  # odd rows: a length that no stride divides
    return (given.randn(2, size), given.rand(), given.randn(12), size - 5, "both"), {}


def _linear(given: Given) -> Call:
    cond = Conditioning(given.rand() * 999, given.randn(5, 6), strength=0.5, name="five tokens")
    return (given.randn(3, given.rows, 12), cond), {"return_maps": True}


def _mixture(given: Given) -> Call:
    tokens = given.rows * 2
    return ((given.randn(tokens, 16), given.pick(50, tokens)), given.rand() * 999), {"bias": (0.5, 2.0)}


def _consistency(given: Given) -> Call:
    labels = torch.nn.functional.one_hot(given.pick(4), 4)
    return (given.randn(3, given.rows, 12), given.rand() + 0.1), {"class_labels": labels, "force_fp32": True}


def hourglass(*attentions: str) -> Callable[[int], nn.Module]:
    widths = (16, 24, 32)
    return lambda rows: Hourglass([Level(1, width, kind) for width, kind in zip(widths, attentions, strict=False)])


outsiders = [
    Outsider("adm", lambda rows: ADM(), _adm, odd=28),
    Outsider("adm_wide", lambda rows: ADM(mult=(1, 2), attend=1), _adm, odd=26),
    Outsider("uvit", lambda rows: UViT((rows, 16)), _uvit, odd=26),
    Outsider("rearranged", lambda rows: RearrangedDiT(), _rearranged, odd=26),
    Outsider("rearranged_unconditional", lambda rows: RearrangedDiT(depth=1), _unconditional, odd=26),
    Outsider("hourglass_mask", hourglass("mask", "mask", "global"), _hourglass, odd=28),
    Outsider("hourglass_unfold", hourglass("unfold", "global"), _hourglass, odd=26),
    Outsider("hourglass_windows", hourglass("windows", "global"), _hourglass, odd=26),
    Outsider("medical", lambda rows: MedicalUNet(), _medical),
    Outsider("medical_final", lambda rows: MedicalUNet(), _final),
    Outsider("audio", lambda rows: AudioUNet(), _audio),
    Outsider("linear_attention", lambda rows: LinearDenoiser(), _linear),
    Outsider("experts_soft", lambda rows: MixtureDiT("soft"), _mixture),
    Outsider("experts_dispatch", lambda rows: MixtureDiT("dispatch"), _mixture),
    Outsider("experts_loop", lambda rows: MixtureDiT("loop"), _mixture),
    Outsider("consistency", lambda rows: ConsistencyModel(), _consistency, odd=26),
]
