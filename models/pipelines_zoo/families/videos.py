"""Pipelines of videos."""

from __future__ import annotations

from typing import Any

from ..pictures import video
from ..recipe import OMIT, Part, Recipe, left_out

_cog: dict[str, Any] = {
    "transformer": {"max_text_seq_length": 16, "sample_height": 16, "sample_width": 16, "sample_frames": 9}
}


class Harmless:
    """In place of a safety checker that would have to be downloaded: lets everything pass."""

    def to(self, *_: Any, **__: Any) -> Harmless:
        return self

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


_cosmos = Recipe({"safety_checker": lambda _: Harmless()})
_pictured = {"image_encoder": 24, "image_processor": Part()}

RECIPES: dict[str, Recipe] = {
    "AnyFlowPipeline": Recipe(call={"video": OMIT}),
    "AnyFlowFARPipeline": Recipe(call={"video": OMIT, "chunk_partition": (1, 2)}),
    "CogVideoXPipeline": Recipe(_cog),
    "CogVideoXVideoToVideoPipeline": Recipe(_cog),
    "CogVideoXImageToVideoPipeline": Recipe({"transformer": _cog["transformer"] | {"in_channels": 8}}),
    "CogVideoXFunControlPipeline": Recipe(
        {"transformer": _cog["transformer"] | {"in_channels": 8}}, {"control_video": lambda _: video()}
    ),
    **{
        f"Cosmos{kind}Pipeline": _cosmos
        for kind in (
            "TextToWorld",
            "VideoToWorld",
            "2TextToImage",
            "2VideoToWorld",
            "2_5_PredictBase",
            "2_5_Transfer",
            "3Omni",
        )
    },
    "CosmosVideoToWorldPipeline": _cosmos | Recipe(call={"image": OMIT}),
    "Cosmos2VideoToWorldPipeline": _cosmos | Recipe(call={"video": OMIT}),
    "Cosmos3OmniPipeline": _cosmos | Recipe(call={"video": OMIT}),
    "EasyAnimatePipeline": Recipe({"transformer": {"in_channels": 4, "out_channels": 4}}),
    "EasyAnimateControlPipeline": left_out(
        "diffusers' own call fails: it gives `encode_prompt` an argument that it does not take"
    ),
    "HunyuanVideo15Pipeline": Recipe({"text_encoder": 24, "text_encoder_2": 12}),
    "HunyuanVideo15ImageToVideoPipeline": Recipe(
        {"text_encoder": 24, "text_encoder_2": 12, "image_encoder": 20, "transformer": {"target_size": 64}}
    ),
    "HunyuanVideoFramepackPipeline": Recipe({"image_encoder": 12}),
    "HunyuanVideoImageToVideoPipeline": Recipe({"transformer": Part("hunyuan_video_replace")}),
    "Kandinsky5I2IPipeline": Recipe({"text_encoder_2": 20}, {"max_sequence_length": 1024}),
    "Kandinsky5T2IPipeline": Recipe({"text_encoder_2": 20}),
    "Kandinsky5T2VPipeline": Recipe({"text_encoder_2": 20}),
    "Kandinsky5I2VPipeline": Recipe({"text_encoder_2": 20}),
    "Kandinsky6TI2VAPipeline": Recipe({"text_encoder_2": 20}),
    **dict.fromkeys(
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        Recipe({"vae": Part(kind="AutoencoderKLWan"), "text_encoder": Part(kind="Gemma2Model")}),
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Recipe(call={"overlap_history": 1}),
    "HeliosPipeline": Recipe(call={"video": OMIT}),
    "HeliosPyramidPipeline": Recipe(call={"video": OMIT}),
    "LattePipeline": Recipe(call={"video_length": 3}),
    **{f"HunyuanVideo{kind}Pipeline": Recipe() for kind in ()},
}
