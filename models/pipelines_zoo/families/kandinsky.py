"""Kandinsky's and other pipelines of two stages: a prior makes an image embedding, a decoder the picture."""

from __future__ import annotations

from typing import Any

from ..pictures import embedding
from ..recipe import Part, Recipe
from ..tokenizers import VOCABULARY

_movq = Part("movq_decode")
_prior_options: dict[str, Any] = {"num_embeddings": 32, "embedding_dim": 24}
_unclip = Part(options={"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0})
_prior = Recipe(
    {"prior": _prior_options, "image_encoder": 24, "text_encoder": 24, "image_processor": Part(), "scheduler": _unclip}
)
_inner: dict[str, Any] = {
    "prior_prior": _prior_options,
    "prior_image_encoder": 24,
    "prior_text_encoder": 24,
    "prior_image_processor": Part(),
    "prior_scheduler": _unclip,
}
_embeds: dict[str, Any] = {
    "image_embeds": lambda _: embedding(1, 24, seed=1),
    "negative_image_embeds": lambda _: embedding(1, 24, seed=2),
}


def _multilingual(_: Any) -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "transformerDimSize": 24, "imageDimSize": 24, "hidden_size": 24,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 100,
    }  # fmt: skip
    return MultilingualCLIP(MCLIPConfig(**options)).eval()


_two_one = Recipe({"unet": Part("kandinsky_21"), "movq": _movq, "text_encoder": _multilingual})
_two_two = Recipe({"unet": Part("kandinsky_22"), "movq": _movq})
_hinted = Recipe(
    {"unet": Part("kandinsky_22_hint"), "movq": _movq}, _embeds | {"hint": lambda _: embedding(1, 3, 256, 256)}
)
_painted: dict[str, Any] = {"unet": Part("kandinsky_22", options={"in_channels": 9})}

RECIPES: dict[str, Recipe] = {
    "KandinskyPriorPipeline": _prior,
    "KandinskyV22PriorPipeline": _prior,
    "KandinskyV22PriorEmb2EmbPipeline": _prior,
    **{f"Kandinsky{kind}Pipeline": _two_one | Recipe(call=_embeds) for kind in ("", "Img2Img")},
    "KandinskyInpaintPipeline": _two_one | Recipe({"unet": Part("kandinsky_21", options={"in_channels": 9})}, _embeds),
    **{f"Kandinsky{kind}CombinedPipeline": _two_one | Recipe(_inner) for kind in ("", "Img2Img")},
    "KandinskyInpaintCombinedPipeline": _two_one
    | Recipe(_inner | {"unet": Part("kandinsky_21", options={"in_channels": 9})}),
    **{f"KandinskyV22{kind}Pipeline": _two_two | Recipe(call=_embeds) for kind in ("", "Img2Img")},
    "KandinskyV22InpaintPipeline": _two_two | Recipe(_painted, _embeds),
    **{f"KandinskyV22{kind}CombinedPipeline": _two_two | Recipe(_inner) for kind in ("", "Img2Img")},
    "KandinskyV22InpaintCombinedPipeline": _two_two | Recipe(_inner | _painted),
    "KandinskyV22ControlnetPipeline": _hinted,
    "KandinskyV22ControlnetImg2ImgPipeline": _hinted,
}
