"""Places crops around the salient part of an image. Pure, deterministic functions with Pillow and numpy.

``smart`` scores crops as jwagner/smartcrop.js with its default values, which BIRME also uses: detail, skin colours and
saturation increase the score, most of all near the centre and the lines of thirds of the crop, and decrease it outside
of the crop. ``focal`` is the focal point of AUTOMATIC1111's webui without its face detector: the mean of the centre of
the corners and of the window with the highest entropy, weighted 0.5 to 0.15.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

FOCUSES = ("center", "smart", "focal")

SHORT_SIDE = 256  # pixels; larger images are shrunk before they are scored
MAX_SCORED = 64 * SHORT_SIDE**2  # pixels; only images with aspect ratios beyond 64 to 1 reach this limit
CELL = 8  # side in pixels of the cells whose scores are summed
DETAIL_WEIGHT = 0.2
SKIN_COLOUR, SKIN_THRESHOLD, SKIN_BIAS, SKIN_WEIGHT = (0.78, 0.57, 0.44), 0.8, 0.01, 1.8
SKIN_BRIGHTNESS = (0.2, 1.0)
SATURATION_THRESHOLD, SATURATION_BIAS, SATURATION_WEIGHT = 0.4, 0.2, 0.1
SATURATION_BRIGHTNESS = (0.05, 0.9)
OUTSIDE, EDGE_RADIUS, EDGE_WEIGHT = -0.5, 0.4, -20.0
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float64)

CORNERS, CORNER_QUALITY, CORNER_DISTANCE, BOTTOM = 100, 0.04, 0.06, 0.1
EDGES_WEIGHT, ENTROPY_WEIGHT, ENTROPY_STEP = 0.5, 0.15, 4


def place_box(image: Image.Image, box: tuple[float, float], focus: str = "center") -> tuple[float, float]:
    """Return the best position (left, top) in pixels of a box (width, height) in an RGB image.

    The box must be the largest one of its aspect ratio, so it can move along one side only. Among positions with equal
    scores, the one nearest to the centre is chosen.
    """
    spare = (max(0.0, image.width - box[0]), max(0.0, image.height - box[1]))
    if focus == "center" or max(spare) < 0.5:
        return spare[0] / 2, spare[1] / 2
    area = image.width * image.height
    shrink = min(1.0, SHORT_SIDE / min(image.size), (MAX_SCORED / area) ** 0.5)
    size = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
    small = image.resize(size, Image.Resampling.BOX) if size != image.size else image
    inner = (box[0] * size[0] / image.width, box[1] * size[1] / image.height)
    x, y = _smart(small, inner) if focus == "smart" else _focal(small, inner)
    return x * spare[0], y * spare[1]


def saliency(pixels: np.ndarray) -> np.ndarray:
    """Return the saliency of each pixel, float64 [H,W] and non-negative, of an image, uint8 [H,W,3]."""
    rgb = pixels.astype(np.float64) / 255
    light = rgb @ LUMA
    edge = np.pad(light, 1, mode="edge")
    around = edge[:-2, 1:-1] + edge[2:, 1:-1] + edge[1:-1, :-2] + edge[1:-1, 2:]
    detail = np.clip(np.abs(4 * light - around), 0, 1)
    direction = rgb / np.maximum(np.linalg.norm(rgb, axis=2, keepdims=True), 1e-9)
    near_skin = 1 - np.linalg.norm(direction - np.array(SKIN_COLOUR), axis=2)
    skin = _above(near_skin, SKIN_THRESHOLD) * _between(light, SKIN_BRIGHTNESS)
    high, low = rgb.max(axis=2), rgb.min(axis=2)
    spread = high - low
    lightness = (high + low) / 2
    room = np.where(lightness > 0.5, 2 - high - low, high + low)
    saturation = np.divide(spread, room, out=np.zeros_like(spread), where=room > 1e-9)
    vivid = _above(saturation, SATURATION_THRESHOLD) * _between(lightness, SATURATION_BRIGHTNESS)
    return (
        DETAIL_WEIGHT * detail
        + SKIN_WEIGHT * skin * (detail + SKIN_BIAS)
        + SATURATION_WEIGHT * vivid * (detail + SATURATION_BIAS)
    )


def _above(values: np.ndarray, threshold: float) -> np.ndarray:
    return np.clip((values - threshold) / (1 - threshold), 0, 1)


def _between(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (values >= limits[0]) & (values <= limits[1])


def _smart(image: Image.Image, box: tuple[float, float]) -> tuple[float, float]:
    """Return the best position of a box by saliency, as fractions of the free space; (0.5, 0.5) is the centre."""
    scores = saliency(np.asarray(image))
    if not scores.any():
        return 0.5, 0.5
    height, width = scores.shape[0] // CELL or 1, scores.shape[1] // CELL or 1
    rows = np.arange(scores.shape[0]) * height // scores.shape[0]
    columns = np.arange(scores.shape[1]) * width // scores.shape[1]
    cells = np.zeros((height, width))
    np.add.at(cells, (rows[:, None], columns[None, :]), scores)
    inner_width = min(width, max(1, round(box[0] * width / image.width)))
    inner_height = min(height, max(1, round(box[1] * height / image.height)))
    weights = _importance(inner_width, inner_height)
    total = cells.sum()
    found = []
    for y in range(height - inner_height + 1):
        for x in range(width - inner_width + 1):
            part = cells[y : y + inner_height, x : x + inner_width]
            score = float((part * weights).sum() + OUTSIDE * (total - part.sum()))
            share = (_share(x, width - inner_width), _share(y, height - inner_height))
            off_centre = abs(share[0] - 0.5) + abs(share[1] - 0.5)
            found.append((round(score, 9), -off_centre, share))
    return max(found)[2]


def _share(place: int, room: int) -> float:
    return place / room if room else 0.5


def _importance(width: int, height: int) -> np.ndarray:
    """Return the weight [H,W] of each cell of a crop: high in the centre and on the thirds, negative at the edges."""
    x = np.abs(0.5 - (np.arange(width) + 0.5) / width)[None, :] * 2
    y = np.abs(0.5 - (np.arange(height) + 0.5) / height)[:, None] * 2
    rim = EDGE_WEIGHT * (np.maximum(x - 1 + EDGE_RADIUS, 0) ** 2 + np.maximum(y - 1 + EDGE_RADIUS, 0) ** 2)
    middle = np.sqrt(2) - np.sqrt(x**2 + y**2)
    return middle + np.maximum(0, middle + rim + 0.5) * 1.2 * (_thirds(x) + _thirds(y)) + rim


def _thirds(place: np.ndarray) -> np.ndarray:
    """Return values that reach 1 on the lines of thirds; ``place`` is 0 in the centre and 1 at the edge."""
    return np.maximum(0, 1 - ((place - 1 / 3) * 8) ** 2)


def _focal(image: Image.Image, box: tuple[float, float]) -> tuple[float, float]:
    points = [(EDGES_WEIGHT, _corner_centre(image)), (ENTROPY_WEIGHT, _highest_entropy(image, box))]
    known = [(weight, point) for weight, point in points if point is not None]
    whole = sum(weight for weight, _ in known)
    x = sum(weight * point[0] for weight, point in known) / whole
    y = sum(weight * point[1] for weight, point in known) / whole
    return _clamped(x, box[0], image.width), _clamped(y, box[1], image.height)


def _clamped(middle: float, inner: float, outer: int) -> float:
    room = outer - inner
    return min(1.0, max(0.0, (middle - inner / 2) / room)) if room > 0.5 else 0.5


def _corner_centre(image: Image.Image) -> tuple[float, float] | None:
    """Return the mean position of the strongest corners (Shi and Tomasi); the bottom is excluded due to watermarks."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    down, right = np.gradient(grey) if min(grey.shape) > 1 else (np.zeros_like(grey),) * 2
    xx, yy, xy = (_blurred(product) for product in (right * right, down * down, right * down))
    strength = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    strength[grey.shape[0] - int(grey.shape[0] * BOTTOM) :] = 0
    strongest = strength.max()
    if strongest <= 1e-6:
        return None
    rows, columns = np.nonzero(strength >= CORNER_QUALITY * strongest)
    order = np.lexsort((columns, rows, -strength[rows, columns]))
    apart = (CORNER_DISTANCE * min(image.size)) ** 2
    kept = np.empty((0, 2))
    for place in order:
        point = np.array([columns[place], rows[place]], dtype=np.float64)
        if not len(kept) or ((kept - point) ** 2).sum(axis=1).min() >= apart:
            kept = np.vstack([kept, point])
        if len(kept) == CORNERS:
            break
    middle = kept.mean(axis=0)
    return float(middle[0]), float(middle[1])


def _blurred(values: Any) -> np.ndarray:
    padded = np.pad(values, 1, mode="edge")
    lines = padded[:-2] + padded[1:-1] + padded[2:]
    return (lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:]) / 9


def _highest_entropy(image: Image.Image, box: tuple[float, float]) -> tuple[float, float]:
    """Return the centre of the window with the highest entropy in the dithered image."""
    dots = np.asarray(image.convert("1"), dtype=np.float64)
    sums = np.pad(dots.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    width, height = min(dots.shape[1], round(box[0])), min(dots.shape[0], round(box[1]))
    found = []
    for y in range(0, dots.shape[0] - height + 1, ENTROPY_STEP):
        for x in range(0, dots.shape[1] - width + 1, ENTROPY_STEP):
            white = sums[y + height, x + width] - sums[y, x + width] - sums[y + height, x] + sums[y, x]
            share = white / (width * height)
            entropy = -sum(p * np.log2(p) for p in (share, 1 - share) if p > 0)
            middle = (x + width / 2, y + height / 2)
            off = abs(middle[0] - image.width / 2) + abs(middle[1] - image.height / 2)
            found.append((round(float(entropy), 9), -off, middle))
    return max(found)[2]
