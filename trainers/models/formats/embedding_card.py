"""Draws the caption on image embeddings, as the webui does: name, base model, number of vectors and steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST_SIDE = 512  # pixels; smaller images are enlarged so that the caption is legible


def plain_card() -> Image.Image:
    """Return the default image for an embedding without a preview."""
    rows = np.linspace(1, 0, _SMALLEST_SIDE)[:, None, None]
    shade = np.array([70, 96, 140]) * rows + np.array([40, 44, 62]) * (1 - rows)
    return Image.fromarray(np.broadcast_to(shade, (_SMALLEST_SIDE, _SMALLEST_SIDE, 3)).astype(np.uint8))


def captioned(image: Image.Image, caption: Sequence[str]) -> Image.Image:
    """Return an RGB copy, enlarged if small, with the caption: a title at the top and up to three footers."""
    image = image.convert("RGB")
    scale = -(-_SMALLEST_SIDE // min(image.size))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    if not caption:
        return image
    width, height = image.size
    y = np.arange(height) / height
    shade = np.clip(np.maximum(1 - np.cos(1.65 * (1 - y)), 1 - np.cos(1.5 * y)), 0, 1)
    alpha = Image.fromarray(np.repeat((shade * 255).astype(np.uint8)[:, None], width, axis=1))
    image = Image.composite(Image.new("RGB", image.size), image, alpha)
    draw = ImageDraw.Draw(image, "RGBA")
    pad, white = 10, (255, 255, 255, 230)
    title, footers = caption[0], list(caption[1:4])
    draw.text((pad, pad), title, fill=white, font=_font([title], int(width * 0.75) - 4 * pad, largest=72))
    font = _font(footers, width // 3 - pad * 2, largest=28)
    for text, x, anchor in zip(footers, (pad, width // 2, width - pad), ("ls", "ms", "rs"), strict=False):
        draw.text((x, height - pad), text, fill=white, font=font, anchor=anchor)
    return image


def _font(texts: Sequence[str], width: int, *, largest: int) -> Any:
    """Return the largest font in which every text is at most `width` pixels wide."""
    widest = max((ImageFont.load_default(100).getlength(text) for text in texts), default=0)
    return ImageFont.load_default(max(8, min(largest, int(100 * width / max(widest, 1)))))
