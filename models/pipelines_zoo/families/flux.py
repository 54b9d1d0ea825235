"""Flux and transformers that take the latent as packed tokens like it."""

from __future__ import annotations

from typing import Any

import torch

from ..pictures import picture
from ..recipe import OMIT, Part, Recipe

_texts: dict[str, Any] = {"text_encoder": 20, "text_encoder_2": 24}
_flux = Recipe(_texts)
_wide = _flux | Recipe({"transformer": {"in_channels": 32, "out_channels": 16}})


def _normed(_: Any) -> Any:
    from ..parts import model

    vae: Any = model("vae_flux2_decode", latent_channels=4)
    vae.bn.running_mean.copy_(torch.linspace(-0.1, 0.1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.8, 1.2, 16))
    return vae


def layers(count: int = 4, **options: Any) -> dict[str, Any]:
    """A language model of so many layers, the hidden states of some of which are the text."""
    return {"num_hidden_layers": count} | options


_klein = Recipe(
    {"vae": _normed, "text_encoder": Part(width=8, options=layers(4))}, {"text_encoder_out_layers": (1, 2, 3)}
)
_cloze = Recipe(
    {"resolution": 32, "transformer": {"in_channels": 16 + 16 + 16, "out_channels": 16}},
    {
        "task_prompt": "a red circle",
        "content_prompt": "a circle",
        "image": lambda _: [[picture(0), picture(1)], [picture(2), None]],
    },
)
_refined = Recipe(call={"image_reference": OMIT})

RECIPES: dict[str, Recipe] = {
    **{f"Flux{kind}Pipeline": _flux for kind in ("", "Img2Img", "Inpaint", "Kontext")},
    "FluxKontextInpaintPipeline": _flux | _refined,
    **{f"FluxControlNet{kind}Pipeline": _flux for kind in ("", "Img2Img", "Inpaint")},
    **{f"FluxControl{kind}Pipeline": _wide for kind in ("", "Img2Img")},
    "FluxControlInpaintPipeline": _wide,
    "FluxFillPipeline": _flux | Recipe({"transformer": {"in_channels": 16 + 16 + 16, "out_channels": 16}}),
    "FluxPriorReduxPipeline": Recipe({"image_embedder": {"redux_dim": 24, "txt_in_features": 24}, "image_encoder": 24}),
    "Flux2Pipeline": _klein | Recipe({"text_encoder": Part(width=8, options={"text_config": layers(4)})}),
    "Flux2KleinPipeline": _klein,
    "Flux2KleinKVPipeline": _klein,
    "Flux2KleinInpaintPipeline": _klein | _refined,
    "VisualClozeGenerationPipeline": _flux | _cloze,
    "VisualClozePipeline": _flux | _cloze | Recipe(call={"upsampling_height": 32, "upsampling_width": 32}),
}
