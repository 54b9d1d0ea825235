"""Build the parts of a small pipeline by the classes that its signature names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ..case import Case, randomise_constants
from ..zoo import CASES
from ..zoo.classes import _attributes, _functions
from .pictures import processor
from .recipe import Part, Recipe
from .texts import encoder
from .tokenizers import tokenizer

#: entries of a denoiser's configuration that say how wide its text is, the first one that is set
WIDTHS = (
    "encoder_hid_dim", "joint_attention_dim", "text_embed_dim", "text_dim", "caption_channels", "cross_attention_dim",
    "cap_feat_dim", "context_in_dim", "text_hidden_dim", "text_in_dim", "encoder_hidden_size", "in_text_dim",
    "llm_features_dim", "crossattn_emb_channels", "embedding_dim", "conditioning_dim", "cond_embed_dim",
)  # fmt: skip
#: parts that are left out where a pipeline can do without them
ALWAYS_SPARED = ("safety_checker", "watermarker")
SPARED = ("feature_extractor", "image_encoder", "image_processor")
DEFAULT_WIDTH = 24
_MOMENTS: dict[str, Any] = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [0.9, 1.1, 1.0, 0.8]}
#: options that every part of a class gets
GENERAL: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"shift_factor": 0.1, "scaling_factor": 0.7},
    "UNet2DConditionModel": {"sample_size": 32},
    "UNet2DModel": {"sample_size": 32},
    "VQModel": {"lookup_from_codebook": True},
    **dict.fromkeys(("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"), _MOMENTS),
    "AutoencoderKLWan": {**_MOMENTS, "scale_factor_spatial": 4},
    "AutoencoderKLLTX2Video": {"decoder_inject_noise": False},  # as the published ones
}


class Parts(Mapping[str, Any]):
    """The parts of a pipeline of a class, built when they are asked for first."""

    def __init__(self, kind: type, recipe: Recipe) -> None:
        self.kind = kind
        self._recipe = recipe
        self._types: dict[str, tuple[Any, ...]] = kind._get_signature_types()
        self._optional = set(kind._optional_components)
        self._built: dict[str, Any] = {}

    def __iter__(self) -> Any:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = self._make(name)
        return self._built[name]

    def arguments(self) -> dict[str, Any]:
        """All arguments of the pipeline's constructor; those with a plain default are left to it."""
        parameters = inspect.signature(self.kind.__init__).parameters
        names = [name for name in self if name in self._recipe.parts or not self._is_default(parameters[name])]
        return {name: self[name] for name in names}

    def _is_default(self, parameter: inspect.Parameter) -> bool:
        """Whether the constructor's default is as good: of numbers and flags, and of what most pipelines lack."""
        if parameter.default is None:
            return not (self._model_class(parameter.name) or parameter.name.startswith(("text_encoder", "tokenizer")))
        return parameter.default is not inspect.Parameter.empty or parameter.name in ("args", "kwargs")

    def width(self, kind: Any) -> int:
        """How wide the text of the denoiser is that an encoder of this class should make."""
        wanted = ("pooled_projection_dim", *WIDTHS) if kind.__name__.startswith("CLIPText") else WIDTHS
        for name in self:
            if (found := self._model_class(name)) is None or "Autoencoder" in found.__name__:
                continue
            config = self[name].config
            for key in wanted:
                value = config.get(key)
                if isinstance(value, list | tuple):
                    value = next((each for each in value if isinstance(each, int)), None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return DEFAULT_WIDTH

    def _model_class(self, name: str) -> Any:
        """The class of a part that is a denoiser, a ControlNet or an autoencoder."""
        return next((each for each in self._classes(name) if each.__name__ in _cases()), None)

    def _classes(self, name: str) -> list[Any]:
        spec = self._recipe.parts.get(name)
        if isinstance(spec, Part) and spec.kind:
            return [_class(spec.kind)]
        return [each for each in self._types[name] if isinstance(each, type)]

    def _make(self, name: str) -> Any:
        spec = self._recipe.parts.get(name, self)
        if spec is self:
            if name in ALWAYS_SPARED or (name in self._optional and name in SPARED):
                return None
            spec = Part()
        if isinstance(spec, int) and not isinstance(spec, bool):
            spec = Part(width=spec)
        if isinstance(spec, dict):
            spec = Part(options=spec)
        if callable(spec) and not isinstance(spec, type | nn.Module):
            return spec(self)
        return self._of(name, spec) if isinstance(spec, Part) else spec

    def _of(self, name: str, spec: Part) -> Any:
        classes = self._classes(name)
        if spec.case or self._model_class(name):
            kind = self._model_class(name).__name__ if not spec.case else ""
            return model(spec.case or _cases()[kind], **{**GENERAL.get(kind, {}), **spec.options})
        if name.endswith("scheduler") or "Scheduler" in classes[0].__name__:
            return _scheduler(classes, spec)
        kind = classes[0]
        for make in (_tokenizer, processor):
            if (found := make(kind)) is not None:
                return found
        if issubclass(kind, transformers.PreTrainedModel):
            return encoder(kind, spec.width or self.width(kind), **spec.options)
        if issubclass(kind, nn.Module):
            return _seeded(lambda: kind(**spec.options))
        return kind(**spec.options)


def _tokenizer(kind: Any) -> Any:
    try:
        return tokenizer(kind.__name__)
    except KeyError:
        return None


def _scheduler(classes: list[Any], spec: Part) -> Any:
    names = [each.__name__ for each in classes]
    if names[0] in ("KarrasDiffusionSchedulers", "SchedulerMixin"):
        classes = [diffusers.DDIMScheduler]
    # pipelines warn of the older defaults, and replace them
    options = {"steps_offset": 1, "clip_sample": False} if classes[0] is diffusers.DDIMScheduler else {}
    return classes[0](**{**options, **spec.options})


def _class(name: str) -> Any:
    return getattr(diffusers, name, None) or getattr(transformers, name)


@cache
def _cases() -> dict[str, str]:
    """By class of diffusers, the first case of the zoo that is about it."""
    found: dict[str, str] = {}
    for case in CASES:
        names = [name for one in _functions(case.model) for name in _attributes(one.__code__, "diffusers")]
        for name in (case.covers, *names[:1]):
            if name:
                found.setdefault(name, case.name)
    return found


def model(name: str, **options: Any) -> nn.Module:
    """The model of a case of the zoo (of an autoencoder's half: the whole), with other options if there are any."""
    case: Case = next(each for each in CASES if each.name == name)
    built: Any = case.build()
    built = getattr(built, "vae", built)
    if not options:
        return built
    kept = {key: value for key, value in built.config.items() if not key.startswith("_")}
    return _seeded(lambda: type(built)(**kept | options))


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make()
    return randomise_constants(made).eval().requires_grad_(False)
