"""Compare two images: PSNR, and an image that shows their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Picture = np.ndarray  #: [H, W, channels] in 0..1: grey, RGB or RGBA

AMPLIFICATION = 100
MARGIN = 12
SMALLEST = 320  #: narrower images are enlarged to at least this many pixels


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB, of images in 0..1; infinite if they are equal."""
    import numpy as np

    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def psnr_text(value: float) -> str:
    return "identical" if value == float("inf") else f"PSNR {value:.1f} dB"


def image(picture: Picture) -> Image:
    """Convert to 8 bits per channel."""
    import numpy as np
    from PIL import Image as PILImage

    values = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return PILImage.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def comparison(left: Picture, right: Picture, labels: tuple[str, str], heading: str = "") -> Image:
    """Show both images and their amplified difference side by side, each above its label.

    Small images are enlarged by an integer factor. Differences are absolute: black means none.
    """
    import numpy as np
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
    height, width = left.shape[:2]
    factor = -(-SMALLEST // width) if width < SMALLEST else 1
    figures = f"{psnr_text(psnr(left, right))}, at most {difference.max():.1e} of 1"
    panels = [
        (left, labels[0], ""),
        (right, labels[1], ""),
        (difference * AMPLIFICATION, f"difference x {AMPLIFICATION}", figures),
    ]
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    step, top = width * factor + MARGIN, MARGIN + (22 if heading else 0)
    canvas = PILImage.new("RGB", (MARGIN + 3 * step, top + height * factor + 50), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN - 4), _fitted(heading, font, 3 * step - MARGIN), "black", font)
    for i, (picture, label, note) in enumerate(panels):
        x, y = MARGIN + i * step, top + height * factor + 6
        shown = image(picture).resize((width * factor, height * factor), PILImage.Resampling.NEAREST)
        canvas.paste(shown, (x, top))
        pen.text((x, y), _fitted(label, font, width * factor), "black", font)
        pen.text((x, y + 20), _fitted(note, small, width * factor), "dimgrey", small)
    return canvas


def _fitted(text: str, font: Any, width: int) -> str:
    """The text, shortened to fit into `width` pixels."""
    shown = text
    while shown and font.getlength(shown) > width:
        shown = shown[:-2].rstrip("…") + "…" if len(shown) > 2 else ""
    return shown
