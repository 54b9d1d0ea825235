"""Stable Diffusion and what is built like it: a UNet, one CLIP text encoder."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

from ..pictures import SIZE, embedding, mask, picture, processor, video
from ..recipe import OMIT, Part, Recipe, left_out
from ..texts import _vision
from ..tokenizers import tokenizer

#: a UNet of two levels
TWO: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TWO_DOWN = {key: value for key, value in TWO.items() if key != "up_block_types"}
#: a ControlNet that halves its picture once, as the VAE does
NET: dict[str, Any] = {"conditioning_embedding_out_channels": (8, 16)}
SEEING = {"image_encoder": 24, "feature_extractor": Part()}


def unet(**options: Any) -> Recipe:
    return Recipe({"unet": options})


def _adapter(_: Any) -> Any:
    return diffusers.T2IAdapter(channels=[16, 32, 32], num_res_blocks=1, downscale_factor=2)


def _motion(_: Any) -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8,
        motion_num_attention_heads=2, motion_max_seq_length=16,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * embedding(*parameter.shape))
    return adapter


def _example_encoder(_: Any) -> Any:
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
    from transformers import CLIPVisionConfig

    config: Any = CLIPVisionConfig(**_vision(24))
    return PaintByExampleImageEncoder(config, proj_size=24).eval()


def words_and_pictures(_: Any) -> Any:
    import transformers

    pictures = processor(transformers.CLIPImageProcessorPil)
    return transformers.CLIPProcessor(image_processor=pictures, tokenizer=tokenizer("CLIPTokenizer"))


_controlled = Recipe({"controlnet": NET})
_parts: dict[str, Any] = {"unet": TWO, "motion_adapter": _motion}
_moving = Recipe(_parts, {"num_frames": 4})
_filmed = Recipe(_parts, {"video": lambda _: video(4)})
_moving_frames = Recipe(call={"conditioning_frames": lambda _: video(4)})
_pictured = Recipe(call={"control_image": lambda _: picture(1)})

RECIPES: dict[str, Recipe] = {
    "StableDiffusionInpaintPipeline": unet(in_channels=9),
    "StableDiffusionInstructPix2PixPipeline": unet(in_channels=8),
    "StableDiffusionImageVariationPipeline": Recipe(SEEING),
    "StableDiffusionLatentUpscalePipeline": Recipe(
        {"unet": Part("unet_upscaler", options={"time_cond_proj_dim": 128 + 24})},
        {"image": lambda _: picture(size=32), "height": OMIT, "width": OMIT},
    ),
    "StableDiffusionUpscalePipeline": Recipe(
        {"unet": {"in_channels": 7, "num_class_embeds": 1000}}, {"image": lambda _: picture(size=16)}
    ),
    "StableDiffusionDepth2ImgPipeline": Recipe(
        {
            "unet": {"in_channels": 5},
            "depth_estimator": Part(
                options={
                    "backbone_config": None,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 8,
                    "is_hybrid": False,
                    "neck_hidden_sizes": [8, 8, 8, 8],
                    "fusion_hidden_size": 8,
                    "backbone_out_indices": [0, 1, 2, 3],
                }
            ),
        }
    ),
    "StableDiffusionGLIGENPipeline": Recipe(
        {"unet": Part("unet_gligen")},
        {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]},
    ),
    "StableDiffusionGLIGENTextImagePipeline": Recipe(
        {
            "unet": Part("unet_gligen", options={"attention_type": "gated-text-image"}),
            "image_encoder": 24,
            "processor": words_and_pictures,
            "image_project": lambda _: diffusers.pipelines.stable_diffusion.CLIPImageProjection(hidden_size=24),
        },
        {
            "gligen_phrases": ["a cat"],
            "gligen_images": lambda _: [picture(2)],
            "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]],
        },
    ),
    "StableDiffusionLDM3DPipeline": Recipe({"vae": {"in_channels": 6, "out_channels": 6}}),
    "StableDiffusionAttendAndExcitePipeline": Recipe(
        call={"token_indices": [2], "max_iter_to_alter": 1, "attn_res": (16, 16)}
    ),
    "StableDiffusionDiffEditPipeline": Recipe(
        call={
            "mask_image": lambda _: np.asarray(mask(SIZE // 2), dtype=np.float32)[None] / 255,
            "image_latents": lambda _: embedding(1, 2, 4, 32, 32),
            "inpaint_strength": 1.0,
        }
    ),
    "StableDiffusionPix2PixZeroPipeline": Recipe(
        {"caption_generator": None, "caption_processor": None},
        {
            "source_embeds": lambda _: embedding(2, 32, 24, seed=1),
            "target_embeds": lambda _: embedding(2, 32, 24, seed=2),
        },
    ),
    "StableDiffusionParadigmsPipeline": Recipe(
        {"scheduler": Part(kind="DDIMParallelScheduler")}, {"parallel": 2, "num_inference_steps": 3}
    ),
    "StableDiffusionPanoramaPipeline": Recipe(call={"height": 64, "width": 128}),
    "StableUnCLIPImg2ImgPipeline": Recipe(
        {
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 48},
            "image_encoder": 24,
            "feature_extractor": Part(),
            "image_normalizer": {"embedding_dim": 24},
            "image_noising_scheduler": Part(kind="DDPMScheduler"),
        }
    ),
    "StableUnCLIPPipeline": Recipe(
        {
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 48},
            "prior": {"embedding_dim": 24, "num_embeddings": 32, "additional_embeddings": 4},
            "prior_text_encoder": 24,
            "image_normalizer": {"embedding_dim": 24},
            "image_noising_scheduler": Part(kind="DDPMScheduler"),
            "prior_scheduler": Part(
                kind="UnCLIPScheduler",
                options={"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0},
            ),
        }
    ),
    "StableDiffusionAdapterPipeline": Recipe({"adapter": _adapter}),
    "CycleDiffusionPipeline": Recipe(
        {"scheduler": {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}},
        {"source_prompt": "a blue circle", "strength": 0.8, "num_inference_steps": 4, "eta": 0.1},
    ),
    "LatentConsistencyModelPipeline": unet(time_cond_proj_dim=16),
    "LatentConsistencyModelImg2ImgPipeline": unet(time_cond_proj_dim=16),
    "PaintByExamplePipeline": Recipe(
        {
            "unet": {"in_channels": 9},
            "image_encoder": _example_encoder,
            "feature_extractor": Part(),
        },
        {"example_image": lambda _: picture(3)},
    ),
    "PIAPipeline": _moving | Recipe({"unet": TWO | {"in_channels": 9}, "motion_adapter": _motion}),
    "AnimateDiffPipeline": _moving,
    "AnimateDiffPAGPipeline": _moving,
    "AnimateDiffControlNetPipeline": _moving | Recipe({"controlnet": NET | TWO_DOWN}) | _moving_frames,
    "AnimateDiffVideoToVideoPipeline": _filmed,
    "AnimateDiffVideoToVideoControlNetPipeline": _filmed | Recipe({"controlnet": NET | TWO_DOWN}) | _moving_frames,
    "AnimateDiffSparseControlNetPipeline": _moving | Recipe(call={"conditioning_frames": lambda _: [picture(1)]}),
    "TextToVideoZeroPipeline": Recipe(call={"video_length": 3, "t0": 0, "t1": 1, "num_inference_steps": 3}),
    "VideoToVideoSDPipeline": Recipe(call={"video": lambda _: video(4)}),
    "TextToVideoSDPipeline": Recipe(call={"num_frames": 4}),
    "I2VGenXLPipeline": left_out("needs transformers 4: it reads `CLIPTextModel.text_model`"),
    "StableVideoDiffusionPipeline": Recipe(
        {"image_encoder": {"image_size": 224, "patch_size": 56}, "feature_extractor": Part()},
        {"num_frames": 4, "decode_chunk_size": 4},
    ),
    "SemanticStableDiffusionPipeline": Recipe(call={"editing_prompt": ["a blue circle"]}),
    **dict.fromkeys(
        ("MarigoldDepthPipeline", "MarigoldNormalsPipeline"),
        Recipe({"unet": {"in_channels": 8}}, {"processing_resolution": 0}),
    ),
    "MarigoldIntrinsicsPipeline": Recipe(
        {
            "unet": {"in_channels": 12, "out_channels": 8},
            "target_properties": lambda _: {"target_names": ["albedo", "roughness"]},
        },
        {"processing_resolution": 0},
    ),
    **{
        f"StableDiffusionControlNet{kind}Pipeline": _controlled
        for kind in ("", "Img2Img", "Inpaint", "PAG", "PAGInpaint")
    },
    "StableDiffusionControlNetXSPipeline": Recipe(
        {
            "unet": TWO | {"layers_per_block": 2},
            "controlnet": lambda parts: diffusers.ControlNetXSAdapter.from_unet(
                parts["unet"],
                size_ratio=0.5,
                conditioning_embedding_out_channels=(8, 16),  # pyright: ignore[reportArgumentType]
            ),
        }
    ),
    "VersatileDiffusionPipeline": left_out("has no call of its own: it makes the three others from its parts"),
    "VersatileDiffusionImageVariationPipeline": Recipe({"image_encoder": 24}, {"negative_prompt": OMIT}),
    "VersatileDiffusionTextToImagePipeline": Recipe({"text_unet": None}),
    "VersatileDiffusionDualGuidedPipeline": left_out(
        "diffusers' own call fails: it gives `DualTransformer2DModel` an argument that it does not take"
    ),
}
