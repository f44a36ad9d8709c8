"""The report's pictures: base, tuned and real side by side, and how the tuned ones came about."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from PIL import Image

from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.preview_grid import Cell, Sheet, data_uri, image_tag, mosaic

MOST_CELLS = 9  # of one prompt
LONGEST_SIDE = 384  # pixels of one picture on the page
SCORES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "dino_i": "DINO"}
SCORE_NOTES = {
    "clip_i": "How alike the previews are to real pictures of the subject; higher is more alike.",
    "clip_t": "How well the previews show what their prompts ask for; higher is closer.",
    "dino": "How alike the previews are to real pictures, with more weight on this very subject.",
}


def compare(sheets: Sequence[Sheet], real: Sequence[Image.Image]) -> str:
    """Return the section that sets base, tuned and real pictures side by side, prompt by prompt."""
    if not sheets:
        return _real_only(real)
    first, last = sheets[0], sheets[-1]
    base = first if first.step == 0 and last.step > 0 else None
    tuned = [sheet for sheet in sheets if sheet is not base]
    prompts = list(dict.fromkeys(cell.prompt for cell in sorted(last.cells, key=lambda c: c.row)))
    count = min(MOST_CELLS, max(len(last.of(prompt)) for prompt in prompts))
    columns = math.ceil(math.sqrt(count))
    style = ""
    if real:
        size = min(real[0].width, LONGEST_SIDE)
        sheet = mosaic(real[: columns**2], columns, cell=size, gap=max(1, size // 50))
        style = f"<style>:root{{--real:url({data_uri(sheet, longest=LONGEST_SIDE * 2)})}}</style>"
    slider = ""
    if len(tuned) > 1:
        steps = ",".join(str(sheet.step) for sheet in tuned)
        slider = (
            f'<label class="slider">tuned for <output>{formatting.number(last.step)}</output> steps'
            f'<input type="range" min="0" max="{len(tuned) - 1}" value="{len(tuned) - 1}" data-steps="{steps}"'
            ' aria-label="optimizer step of the tuned pictures"></label>'
        )
    body = "".join(_comparison(prompt, base, tuned, bool(real), columns) for prompt in prompts)
    titles = ["base"] * bool(base) + ["tuned"] + ["real"] * bool(real)
    return (
        f'{style}<section class="compare"><div class="bar"><h2>{", ".join(titles).capitalize()}</h2>{slider}</div>'
        f"{body}</section>"
    )


def _real_only(real: Sequence[Image.Image]) -> str:
    if not real:
        return ""
    tags = "".join(image_tag(image, "training picture", longest=LONGEST_SIDE) for image in real)
    return f'<section><h2>The training pictures</h2><div class="strip">{tags}</div></section>'


def _comparison(prompt: str, base: Sheet | None, tuned: Sequence[Sheet], real: bool, columns: int) -> str:
    panels = []
    if base:
        panels.append(_panel("base", _grid(base.of(prompt), columns, 0)))
    frames = "".join(
        _grid(sheet.of(prompt), columns, n, hidden=n < len(tuned) - 1) for n, sheet in enumerate(tuned)
    )
    panels.append(_panel("tuned", frames))
    if real:
        panels.append(_panel("real", '<div class="real" role="img" aria-label="training pictures"></div>'))
    scores: dict[str, list[float]] = {}
    for cell in tuned[-1].of(prompt):
        for key, value in cell.scores.items():
            scores.setdefault(SCORES.get(key, key), []).append(value)
    told = " · ".join(
        f"{name} {formatting.number(statistics.fmean(values))}" for name, values in scores.items()
    )
    side = f" <small>{escape(told)}</small>" if told else ""
    return (
        f"<article><h3>{escape(prompt) or '<em>empty prompt</em>'}{side}</h3>"
        f'<div class="panels">{"".join(panels)}</div></article>'
    )


def _panel(name: str, inside: str) -> str:
    return f'<figure class="panel" data-role="{name}"><figcaption>{name}</figcaption>{inside}</figure>'


def _grid(cells: Sequence[Cell], columns: int, frame: int, *, hidden: bool = False) -> str:
    tags = "".join(
        image_tag(cell.image, f"{cell.prompt}, seed {cell.seed}", longest=LONGEST_SIDE)
        for cell in cells[:MOST_CELLS]
    )
    start = f'<div class="cells" data-frame="{frame}" style="--columns:{columns}"'
    return f"{start}{' hidden' if hidden else ''}>{tags}</div>"


def over_time(sheets: Sequence[Sheet]) -> str:
    """Return the section that shows one seed of each prompt at every step."""
    if len(sheets) < 3:
        return ""
    rows = []
    for prompt in dict.fromkeys(cell.prompt for cell in sheets[-1].cells):
        frames = [(sheet.step, cells[0]) for sheet in sheets if (cells := sheet.of(prompt))]
        tags = "".join(
            f"<figure>{image_tag(cell.image, f'{prompt}, step {step}', longest=160)}"
            f"<figcaption>{formatting.number(step) if step else 'base'}</figcaption></figure>"
            for step, cell in frames
        )
        rows.append(f'<h3>{escape(prompt)}</h3><div class="film" tabindex="0">{tags}</div>')
    return f"<section><h2>The same seed, step by step</h2>{''.join(rows)}</section>"
