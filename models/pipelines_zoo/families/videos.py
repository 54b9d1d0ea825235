"""Pipelines of videos."""

from __future__ import annotations

from typing import Any

from ..pictures import FRAMES, embedding, video
from ..recipe import OMIT, Part, Recipe, left_out
from .images import EIGHTH
from .unets import words_and_pictures

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
_cosmos_2 = _cosmos | Recipe({"scheduler": {"use_karras_sigmas": True}})
_pictured = {"image_encoder": 24, "image_processor": Part()}

_seeing: dict[str, Any] = {"image_encoder": 12, "image_processor": Part()}
_upsampler: dict[str, Any] = {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1}
_sounding = {"audio_in_channels": 16, "audio_out_channels": 16}
_ltx_2 = Recipe(
    {
        "connectors": {
            "caption_channels": 24,
            "text_proj_in_factor": 3,
            **{
                f"{kind}_connector_{key}": value
                for kind in ("video", "audio")
                for key, value in (
                    ("num_attention_heads", 2), ("attention_head_dim", 12),
                    ("num_layers", 1), ("num_learnable_registers", 8),
                )
            },
        },
        "vocoder": {
            "in_channels": 32, "hidden_channels": 32, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2],
            "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]],
        },
        "audio_vae": {"base_channels": 16},
        "transformer": _sounding,
    }
)  # fmt: skip

#: of the small autoencoder, which pipelines read
STRIDES: dict[str, Any] = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
_keyed = _ltx_2 | Recipe({"transformer": {**_sounding, "use_keyframes_abs_pos_embedding": True}})
#: a short prompt template; where the picture's 16 tokens and the prompt begin, with a token for each letter
_around_a_picture: dict[str, Any] = {
    "template": (
        "<|start_header_id|>system<|end_header_id|>\n\n<image>\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "crop_start": 21, "image_emb_start": 10, "image_emb_end": 26, "image_emb_len": 16,
}  # fmt: skip

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
            "2_5_PredictBase",
            "2_5_Transfer",
            "3Omni",
        )
    },
    "CosmosVideoToWorldPipeline": _cosmos | Recipe({"transformer": {"in_channels": 5}}, {"image": OMIT}),
    "Cosmos2TextToImagePipeline": _cosmos_2,
    "Cosmos2VideoToWorldPipeline": _cosmos_2 | Recipe({"transformer": {"in_channels": 5}}, {"video": OMIT}),
    "Cosmos3OmniPipeline": _cosmos | Recipe({"transformer": {"vocab_size": 640}}, {"video": OMIT}),
    "Cosmos2_5_PredictBasePipeline": _cosmos
    | Recipe(
        {
            "text_encoder": 24,
            "transformer": Part(
                "cosmos2",
                options={
                    "in_channels": 5,
                    "use_crossattn_projection": True,
                    "crossattn_proj_in_channels": 48,
                    "encoder_hidden_states_channels": 24,
                },
            ),
        },
        {"video": OMIT, "image": OMIT},
    ),
    "Cosmos2_5_TransferPipeline": left_out("needs the package torchvision"),
    "EasyAnimateInpaintPipeline": Recipe(
        {"transformer": {"in_channels": 12, "resize_inpaint_mask_directly": False}},
        {
            "video": lambda _: embedding(1, 3, 9, 64, 64).sigmoid(),
            "mask_video": lambda _: (embedding(1, 1, 9, 64, 64) > 0).float(),
        },
    ),
    "EasyAnimatePipeline": Recipe({"transformer": {"in_channels": 4, "out_channels": 4}}),
    "EasyAnimateControlPipeline": left_out(
        "diffusers' own call fails: it gives `encode_prompt` an argument that it does not take"
    ),
    "HunyuanVideo15Pipeline": Recipe({"text_encoder": 24, "text_encoder_2": 12}),
    "HunyuanVideo15ImageToVideoPipeline": Recipe(
        {"text_encoder": 24, "text_encoder_2": 12, "image_encoder": 20, "transformer": {"target_size": 64}}
    ),
    "HunyuanVideoFramepackPipeline": Recipe({"image_encoder": 12}),
    "HunyuanVideoImageToVideoPipeline": Recipe(
        {
            "transformer": Part("hunyuan_video_replace"),
            "text_encoder": Part(options={"pad_token_id": 2, "image_token_index": 355}),
        },
        {"prompt_template": _around_a_picture, "max_sequence_length": 32},
    ),
    "Kandinsky5T2IPipeline": Recipe({"text_encoder_2": 20, "transformer": {"visual_cond": False}}),
    "Kandinsky5T2VPipeline": Recipe({"text_encoder_2": 20}),
    "Kandinsky5I2VPipeline": Recipe({"text_encoder_2": 20}, {"num_frames": 25}),
    "Kandinsky6TI2VAPipeline": Recipe({"text_encoder_2": 20}, {"sample_audio": False}),
    **dict.fromkeys(
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        Recipe({"vae": Part(kind="AutoencoderKLWan"), "text_encoder": Part(kind="Gemma2Model")}, {"frames": FRAMES}),
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Recipe(call={"overlap_history": 1}),
    "HeliosPipeline": Recipe({"scheduler": {"stages": 1, "stage_range": [0, 1]}}, {"video": OMIT}),
    "HeliosPyramidPipeline": Recipe(call={"video": OMIT}),
    "LattePipeline": Recipe(call={"video_length": 3}),
    **{f"HunyuanVideo{kind}Pipeline": Recipe() for kind in ()},
    "LTX2LatentUpsamplePipeline": Recipe({"latent_upsampler": _upsampler}),
    "LTXLatentUpsamplePipeline": Recipe({"latent_upsampler": _upsampler}),
    **{f"LTX2{kind}Pipeline": _ltx_2 for kind in ("", "Condition", "HDR", "InContext", "DFRTemporalRefine")},
    "LTX2VideoDiffusionDecodePipeline": Recipe(
        {"scheduler": Part(kind="FlowMatchEulerDiscreteScheduler"), "vae": None},
        {"latents": lambda _: embedding(1, 4, 3, 8, 8)},
    ),
    "ChronoEditPipeline": Recipe({"transformer": {"in_channels": 12}, **_seeing}),
    "WanImageToVideoPipeline": Recipe(
        {"transformer": Part("wan_i2v", options={"in_channels": 12}), "transformer_2": None, **_seeing}
    ),
    "WanAnimatePipeline": Recipe(
        _seeing,
        {
            "pose_video": lambda _: video(5),
            "face_video": lambda _: video(5),
            "segment_frame_length": 5,
            "prev_segment_conditioning_frames": 1,
            "video": OMIT,
            "background_video": OMIT,
            "mask_video": OMIT,
        },
    ),
    "Kandinsky5I2IPipeline": Recipe(
        {"text_encoder_2": 20, "vae": EIGHTH}, {"max_sequence_length": 1024}, {"resolutions": [(64, 64)]}
    ),
    "LucyEditPipeline": Recipe({"transformer": {"in_channels": 8}}),
    "MochiPipeline": Recipe({"transformer": {"in_channels": 12}, "vae": {"latent_channels": 12}}),
    **dict.fromkeys(
        ("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
        Recipe(
            {
                "guider": Part(kind="ClassifierFreeGuidance"),
                "transformer": {"image_embed_dim": 24},
                "scheduler": Part(kind="FlowMatchEulerDiscreteScheduler"),
            }
        ),
    ),
    "SkyReelsV2ImageToVideoPipeline": Recipe(
        {
            "transformer": Part("skyreels_v2", options={"in_channels": 12}),
            "image_processor": words_and_pictures,
            "image_encoder": 12,
        }
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Recipe({"transformer": {"in_channels": 8}}),
    "LTX2DFRPipeline": _keyed,
    "LTX2DFRTemporalRefinePipeline": _keyed
    | Recipe(
        {
            "temporal_latent_upsampler": _upsampler | {"spatial_upsample": False, "temporal_upsample": True},
            "vae": STRIDES,
        },
        {
            "latents": lambda _: embedding(1, 8, 3, 8, 8),
            "keyframes_latents": lambda _: embedding(1, 8, 2, 8, 8, seed=1),
            "keyframe_positions": [4, 8],
            "audio_latents": lambda _: embedding(1, 8, 12, 2, seed=2),
            "sigmas": [0.9, 0.5],
        },
    ),
    "SanaWMPipeline": Recipe(
        {
            "transformer": {"in_channels": 8, "chunk_plucker_channels": 24},
            "text_encoder": Part(kind="Gemma2Model"),
            "vae": STRIDES | {"timestep_conditioning": False},
        },
        {"action": "w-8", "intrinsics": [64.0, 64.0, 32.0, 32.0], "chi_prompt": ["Describe: "]},
    ),
    "WanVACEPipeline": Recipe({"transformer": {"vace_in_channels": 24}, "transformer_2": None}),
}
