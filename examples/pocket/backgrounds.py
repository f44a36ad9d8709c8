"""Draws the backgrounds of the pocket model's training images: plain colours, two patterns and simple scenes.

Every background has a key (`plain:blue`, `striped:red`, `scene:beach`) and a phrase for captions, so that the
text encoder can learn to distinguish the subject from its background.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 165, 80),
    "turquoise": (70, 200, 195),
    "blue": (50, 105, 215),
    "purple": (130, 75, 185),
    "pink": (245, 160, 195),
    "brown": (130, 85, 50),
    "black": (22, 22, 26),
    "white": (248, 248, 248),
    "gray": (140, 142, 148),
}
PATTERN_COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
SCENES = {
    "beach": "on the beach",
    "grass": "on the grass",
    "snow": "in the snow",
    "desert": "in the desert",
    "night": "at night",
    "water": "under water",
    "city": "in the city",
    "forest": "in the forest",
    "mountains": "in the mountains",
    "sky": "in the sky",
}
KEYS = (
    [f"plain:{name}" for name in COLOURS]
    + [f"striped:{name}" for name in PATTERN_COLOURS]
    + [f"checkered:{name}" for name in PATTERN_COLOURS]
    + [f"scene:{name}" for name in SCENES]
)
# Plain colours have the largest weight, because the captions of most training sets can name them.
_SHARES = {"plain": 4.0, "striped": 1.0, "checkered": 1.0, "scene": 3.0}
WEIGHTS = np.array([_SHARES[key.split(":")[0]] for key in KEYS])
WEIGHTS = WEIGHTS / WEIGHTS.sum()
SIZE = 64


def say_background(key: str) -> str:
    """Return the phrase that describes a background in a caption."""
    kind, name = key.split(":")
    if kind == "scene":
        return SCENES[name]
    article = "an" if name == "orange" else "a"
    return f"on {article} {name} background" if kind == "plain" else f"on a {name} {kind} background"


def _shade(colour: tuple[int, int, int], rng: np.random.Generator, spread: float = 9.0) -> np.ndarray:
    """Return an RGB colour (float32, 0 to 255) with random jitter, so that a name covers a range of values."""
    return np.clip(np.array(colour, np.float32) + rng.normal(0, spread, 3), 0, 255)


def _blend(top: np.ndarray, bottom: np.ndarray, size: int) -> Image.Image:
    """Return a square image of `size` pixels with a vertical gradient between two RGB colours."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = top[None, None] * (1 - ramp) + bottom[None, None] * ramp
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).round().astype(np.uint8))


def _fill(colour: np.ndarray) -> tuple[int, int, int]:
    """Return a colour as a tuple of integers for PIL."""
    return tuple(round(float(value)) for value in np.clip(colour, 0, 255))  # type: ignore[return-value]


def draw_plain(name: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a named colour, with a vertical gradient of random strength that is lighter at the top."""
    colour = _shade(COLOURS[name], rng)
    lift = rng.uniform(0, 14)
    return _blend(np.clip(colour + lift, 0, 255), np.clip(colour - lift, 0, 255), size)


def draw_striped(name: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw stripes of a named colour and white."""
    period, phase = size / rng.choice([4, 5, 6]), rng.uniform(0, size)
    ys, xs = np.mgrid[0:size, 0:size]
    along = [xs, ys, (xs + ys) * 0.7071][rng.integers(3)]
    mask = (((along + phase) / period) % 1.0 < 0.5)[..., None]
    image = np.where(mask, _shade(COLOURS[name], rng), _shade((245, 245, 245), rng, 3))
    return Image.fromarray(image.round().astype(np.uint8))


def draw_checkered(name: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a checkered pattern of a named colour and white."""
    period, shift = size / rng.choice([4, 5, 6]), rng.uniform(0, size, 2)
    ys, xs = np.mgrid[0:size, 0:size]
    mask = ((((xs + shift[0]) // period) + ((ys + shift[1]) // period)) % 2 < 1)[..., None]
    image = np.where(mask, _shade(COLOURS[name], rng), _shade((245, 245, 245), rng, 3))
    return Image.fromarray(image.round().astype(np.uint8))


def _draw_ground(rng: np.random.Generator, size: int, colours: list[tuple[int, int, int]], level: float):
    """Draw sky above ground; return the image, its ImageDraw and the row of the horizon in pixels."""
    sky_top, sky_low, ground_far, ground_near = (_shade(colour, rng, 6) for colour in colours)
    horizon = int(size * (level + rng.uniform(-0.05, 0.05)))
    image = _blend(sky_top, sky_low, size)
    ground = _blend(ground_far, ground_near, size).crop((0, 0, size, size - horizon))
    image.paste(ground, (0, horizon))
    return image, ImageDraw.Draw(image), horizon


def draw_beach(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw sky, a band of sea and yellow sand."""
    colours = [(110, 190, 245), (190, 230, 250), (240, 215, 150), (225, 190, 120)]
    image, pen, horizon = _draw_ground(rng, size, colours, 0.55)
    top = horizon - int(size * rng.uniform(0.14, 0.2))
    pen.rectangle((0, top, size, horizon), fill=_fill(_shade((30, 125, 200), rng, 6)))
    pen.line((0, horizon, size, horizon), fill=(250, 250, 250), width=max(1, size // 40))
    return image


def draw_grass(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a green meadow under a light sky."""
    colours = [(135, 205, 250), (215, 240, 250), (125, 200, 75), (70, 150, 45)]
    image, pen, horizon = _draw_ground(rng, size, colours, 0.45)
    for _ in range(40):
        x, y = rng.integers(size), rng.integers(horizon, size)
        pen.line(
            (x, y, x, y - size // 20), fill=_fill(_shade((55, 130, 40), rng, 10)), width=max(1, size // 64)
        )
    return image


def draw_snow(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw white ground, a pale sky and falling snowflakes."""
    colours = [(150, 175, 205), (205, 220, 235), (250, 252, 255), (225, 235, 248)]
    image, pen, _ = _draw_ground(rng, size, colours, 0.55)
    for x, y in rng.integers(0, size, (26, 2)):
        pen.ellipse((x, y, x + size // 32, y + size // 32), fill=(255, 255, 255))
    return image


def draw_desert(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw orange dunes under an orange sky."""
    colours = [(250, 190, 110), (253, 225, 165), (222, 150, 75), (196, 120, 55)]
    image, pen, horizon = _draw_ground(rng, size, colours, 0.55)
    for _ in range(2):
        x, half = rng.integers(size), size * rng.uniform(0.3, 0.5)
        box = (x - half, horizon - size * 0.1, x + half, horizon + size * 0.35)
        pen.ellipse(box, fill=_fill(_shade((212, 138, 66), rng, 7)))
    return image


def draw_night(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a dark sky with stars and a moon."""
    image = _blend(_shade((10, 12, 45), rng, 4), _shade((38, 38, 95), rng, 5), size)
    pen = ImageDraw.Draw(image)
    for x, y in rng.integers(0, size, (24, 2)):
        pen.ellipse((x, y, x + size // 48, y + size // 48), fill=(245, 240, 200))
    x, y, r = rng.uniform(0.05, 0.85) * size, rng.uniform(0.03, 0.12) * size, 0.13 * size
    pen.ellipse((x, y, x + r, y + r), fill=(250, 240, 190))
    return image


def draw_water(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw deep blue water that is lighter at the top, with bubbles and weeds."""
    image = _blend(_shade((70, 190, 225), rng, 6), _shade((8, 60, 130), rng, 5), size)
    pen = ImageDraw.Draw(image)
    for _ in range(9):
        (x, y), r = rng.integers(0, size, 2), size * rng.uniform(0.02, 0.05)
        pen.ellipse((x - r, y - r, x + r, y + r), outline=(190, 235, 250), width=max(1, size // 64))
    for x in rng.integers(0, size, 4):
        pen.line(
            (x, size, x + 2, size * rng.uniform(0.7, 0.85)), fill=(20, 120, 90), width=max(2, size // 24)
        )
    return image


def draw_city(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw grey houses with lit windows along a street."""
    colours = [(165, 190, 220), (215, 220, 230), (105, 108, 115), (85, 88, 95)]
    image, pen, horizon = _draw_ground(rng, size, colours, 0.8)
    x = -int(rng.integers(0, size // 8))
    while x < size:
        width, top = int(size * rng.uniform(0.17, 0.26)), int(size * rng.uniform(0.08, 0.4))
        pen.rectangle((x, top, x + width, horizon), fill=_fill(_shade((115, 105, 120), rng, 16)))
        step = max(4, size // 12)
        for wy in range(top + step // 2, horizon - step // 2, step):
            for wx in range(x + step // 2, x + width - step // 2, step):
                pen.rectangle((wx, wy, wx + step // 3, wy + step // 3), fill=(250, 225, 130))
        x += width + 1
    return image


def draw_forest(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw dark green trees with brown trunks."""
    colours = [(95, 150, 100), (65, 120, 75), (70, 95, 45), (55, 75, 35)]
    image, pen, horizon = _draw_ground(rng, size, colours, 0.78)
    for x in np.sort(rng.uniform(-0.1, 1.0, 7)) * size:
        width, top = size * rng.uniform(0.2, 0.3), size * rng.uniform(0.0, 0.2)
        middle = x + width / 2
        pen.rectangle(
            (middle - size / 40, horizon - size / 5, middle + size / 40, horizon), fill=(90, 60, 35)
        )
        crown = [(middle, top), (x, horizon - size * 0.1), (x + width, horizon - size * 0.1)]
        pen.polygon(crown, fill=_fill(_shade((25, 85, 45), rng, 12)))
    return image


def draw_mountains(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw grey mountains with white tops."""
    colours = [(120, 180, 235), (205, 228, 245), (115, 150, 95), (85, 125, 70)]
    image, pen, horizon = _draw_ground(rng, size, colours, 0.78)
    for x in np.sort(rng.uniform(-0.25, 0.9, 4)) * size:
        width, top = size * rng.uniform(0.45, 0.65), size * rng.uniform(0.05, 0.3)
        middle, height = x + width / 2, horizon - top
        pen.polygon(
            [(middle, top), (x, horizon), (x + width, horizon)], fill=_fill(_shade((110, 112, 130), rng, 9))
        )
        cap = [
            (middle, top),
            (middle - width * 0.16, top + height * 0.32),
            (middle + width * 0.16, top + height * 0.32),
        ]
        pen.polygon(cap, fill=(248, 250, 253))
    return image


def draw_sky(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a light blue sky with white clouds."""
    image = _blend(_shade((85, 170, 245), rng, 6), _shade((175, 220, 252), rng, 5), size)
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, r = rng.uniform(0, 1) * size, rng.uniform(0, 1) * size, rng.uniform(0.06, 0.1) * size
        for dx in (-1.2, 0.0, 1.2):
            pen.ellipse((x + dx * r - r, y - r * 0.8, x + dx * r + r, y + r * 0.8), fill=(252, 253, 255))
    return image


def draw_background(key: str, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw the background of a key; patterns and scenes are drawn at double size and reduced, for smooth edges."""
    kind, name = key.split(":")
    if kind == "plain":
        return draw_plain(name, rng, size)
    painters = {"striped": draw_striped, "checkered": draw_checkered}
    if kind in painters:
        image = painters[kind](name, rng, size * 2)
    else:
        image = globals()[f"draw_{name}"](rng, size * 2)
    return image.resize((size, size), Image.Resampling.BOX)
