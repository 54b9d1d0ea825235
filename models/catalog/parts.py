"""What published pipelines hold beside their denoisers: encoders of text and images, and an autoencoder."""

from __future__ import annotations

from typing import NamedTuple

#: parameters of encoders, as their pipelines load them (without heads that these leave out)
ENCODERS = {
    "CLIP-L": 123_060_480,
    "CLIP-L with projection": 123_650_304,
    "OpenCLIP-H": 340_387_840,
    "OpenCLIP-bigG": 694_659_840,
    "T5-XXL": 4_762_310_656,
    "UMT5-XXL": 5_680_910_336,
    "CLIP-H of images": 632_076_800,
    "Gemma 2 2B": 2_614_341_888,
    "Llama 3 8B": 7_505_186_816,
    "Qwen2.5-VL 7B": 8_292_166_656,
}


class Beside(NamedTuple):
    """The encoders of a pipeline by name, and the catalog's name of its decoder (None: it is not in the catalog)."""

    encoders: tuple[str, ...]
    decoder: str | None


_SD, _FLUX, _WAN = "sd-vae-decode", "flux-vae-decode", "wan-vae-decode"
_THREE = "CLIP-L with projection", "OpenCLIP-bigG", "T5-XXL"

BESIDE: dict[str, Beside] = {
    "sd15": Beside(("CLIP-L",), _SD),
    "sd21": Beside(("OpenCLIP-H",), _SD),
    "sdxl": Beside(("CLIP-L", "OpenCLIP-bigG"), _SD),
    "sdxl-refiner": Beside(("OpenCLIP-bigG",), _SD),
    "dit-xl-256": Beside((), _SD),
    "dit-xl-512": Beside((), _SD),
    "pixart-alpha": Beside(("T5-XXL",), _SD),
    "pixart-sigma": Beside(("T5-XXL",), _SD),
    "sd3-medium": Beside(_THREE, _FLUX),
    "sd35-medium": Beside(_THREE, _FLUX),
    "sd35-large": Beside(_THREE, _FLUX),
    "flux-dev": Beside(("CLIP-L", "T5-XXL"), _FLUX),
    "chroma": Beside(("T5-XXL",), _FLUX),
    "sana-600m": Beside(("Gemma 2 2B",), "dc-ae-decode"),
    "sana-1600m": Beside(("Gemma 2 2B",), "dc-ae-decode"),
    "lumina2": Beside(("Gemma 2 2B",), _FLUX),
    "qwen-image": Beside(("Qwen2.5-VL 7B",), "qwen-image-vae-decode"),
    "svd": Beside(("CLIP-H of images",), "svd-vae-decode"),
    "animatediff": Beside(("CLIP-L",), _SD),
    "wan21-1.3b": Beside(("UMT5-XXL",), _WAN),
    "wan21-14b": Beside(("UMT5-XXL",), _WAN),
    "wan21-i2v-14b": Beside(("UMT5-XXL", "CLIP-H of images"), _WAN),
    "cogvideox-2b": Beside(("T5-XXL",), "cogvideox-vae-decode"),
    "cogvideox-5b": Beside(("T5-XXL",), "cogvideox-vae-decode"),
    "hunyuan-video": Beside(("Llama 3 8B", "CLIP-L"), "hunyuan-video-vae-decode"),
    "ltx-video": Beside(("T5-XXL",), "ltx-vae-decode"),
    "mochi": Beside(("T5-XXL",), "mochi-vae-decode"),
}
