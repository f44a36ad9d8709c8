"""Draws the loss curves of all training stages as one small image, without a plotting library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 300, 200, 34


def draw_curves(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write an image to `path` with one panel per stage: the loss on a logarithmic scale over steps."""
    sheet = Image.new("RGB", (WIDTH * len(logs), HEIGHT), (255, 255, 255))
    for index, (name, lines) in enumerate(logs.items()):
        sheet.paste(_draw_panel(name, lines), (index * WIDTH, 0))
    sheet.quantize(16).save(path, optimize=True)


def _draw_panel(name: str, lines: list[dict[str, Any]]) -> Image.Image:
    panel = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(panel)
    points = [(line["step"], math.log(max(line["loss"], 1e-6))) for line in lines[1:]]
    steps, heights = zip(*points, strict=True)
    low, high, last = min(heights), max(heights), max(steps)
    spread = max(high - low, 1e-6)
    pen.rectangle((MARGIN, 20, WIDTH - 8, HEIGHT - 22), outline=(190, 190, 190))
    pen.text((MARGIN, 4), f"{name}: loss (log scale)", fill=(30, 30, 30))
    pen.text((2, 20), f"{math.exp(high):.2g}", fill=(90, 90, 90))
    pen.text((2, HEIGHT - 34), f"{math.exp(low):.2g}", fill=(90, 90, 90))
    pen.text((WIDTH - 70, HEIGHT - 18), f"step {last}", fill=(90, 90, 90))
    xs = [MARGIN + (WIDTH - 8 - MARGIN) * step / last for step in steps]
    ys = [HEIGHT - 22 - (HEIGHT - 42) * (height - low) / spread for height in heights]
    pen.line(list(zip(xs, ys, strict=True)), fill=(35, 95, 200), width=2)
    return panel
