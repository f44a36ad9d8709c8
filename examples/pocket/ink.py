"""Writes an example of a style to `examples/ink/`: the pocket model's subjects in blue ink on cream paper.

Outlines are drawn as lines and dark areas as hatching. Twelve images are for training; six images of other
objects are held out. The caption file beside each image names the object and not the style.
"""

from __future__ import annotations

import numpy as np
from images import open_emoji
from PIL import Image, ImageFilter
from subjects import ROOT, WORLD, fetch_packages

SIDE, GLYPH = 256, 208
PAPER, INK = np.array((248, 238, 212), np.float32), np.array((24, 44, 128), np.float32)
TRAIN = ("sunflower", "elephant", "house", "teapot", "butterfly", "slice of pizza", "airplane", "fish", "red apple",
         "guitar", "owl", "cactus")  # fmt: skip
HOLDOUT = ("castle", "penguin", "umbrella", "strawberry", "snail", "top hat")
HATCHES = (
    (0.62, 1),
    (0.4, -1),
    (0.2, 1),
)  # (level, slope): below each brightness level another set of diagonal lines is added


def draw_ink(emoji: Image.Image) -> Image.Image:
    """Draw an RGBA image as ink on paper: lines along its edges, hatching in its dark areas."""
    canvas = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    place = (SIDE - GLYPH) // 2
    canvas.paste(emoji.resize((GLYPH, GLYPH), Image.Resampling.LANCZOS), (place, place))
    alpha = np.asarray(canvas.getchannel("A"), np.float32) / 255
    plain = Image.alpha_composite(Image.new("RGBA", canvas.size, "white"), canvas).convert("RGB")
    soft = plain.filter(ImageFilter.GaussianBlur(2.2))
    light = np.asarray(soft.convert("L"), np.float32) / 255
    change = sum(
        np.hypot(*np.gradient(np.asarray(channel, np.float32) / 255))
        for channel in (*soft.split(), _soft(alpha))
    )
    ink = np.clip((change - 0.045) * 22, 0, 1)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number, (level, way) in enumerate(HATCHES):
        stripes = (rows * way + columns + 6 * (number == 2)) % 12 < 4
        ink = np.maximum(ink, stripes * (light < level) * (alpha > 0.5))
    pixels = PAPER + (INK - PAPER) * ink[..., None]
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    return drawn.filter(ImageFilter.GaussianBlur(0.7))


def _soft(alpha: np.ndarray) -> Image.Image:
    return Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2.2))


def write_ink() -> None:
    """Write the images and captions of `train/` and `holdout/`."""
    assets, _ = fetch_packages()
    codes = {name: code for code, name in WORLD.items()}
    for folder, names in (("train", TRAIN), ("holdout", HOLDOUT)):
        for number, name in enumerate(names, 1):
            target = ROOT / "examples" / "ink" / folder / f"{number:02d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            draw_ink(open_emoji(assets / f"{codes[name]}.webp")).quantize(32).save(target, optimize=True)
            target.with_suffix(".txt").write_text(f"{'an' if name[0] in 'aeiou' else 'a'} {name}\n")


if __name__ == "__main__":
    write_ink()
