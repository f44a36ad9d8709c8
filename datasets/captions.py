"""Builds the caption of a training sample: templates, prompts, tag shuffling and dropout.

All functions are pure, given a random generator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dreamfleet.datasets.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from dreamfleet.datasets.config import DataConfig

# The 27 object templates and 19 style templates of Textual Inversion (arXiv 2208.01618, `ldm/data/personalized*.py`).
OBJECT_TEMPLATES = (
    "a photo of a [name]",
    "a rendering of a [name]",
    "a cropped photo of the [name]",
    "the photo of a [name]",
    "a photo of a clean [name]",
    "a photo of a dirty [name]",
    "a dark photo of the [name]",
    "a photo of my [name]",
    "a photo of the cool [name]",
    "a close-up photo of a [name]",
    "a bright photo of the [name]",
    "a cropped photo of a [name]",
    "a photo of the [name]",
    "a good photo of the [name]",
    "a photo of one [name]",
    "a close-up photo of the [name]",
    "a rendition of the [name]",
    "a photo of the clean [name]",
    "a rendition of a [name]",
    "a photo of a nice [name]",
    "a good photo of a [name]",
    "a photo of the nice [name]",
    "a photo of the small [name]",
    "a photo of the weird [name]",
    "a photo of the large [name]",
    "a photo of a cool [name]",
    "a photo of a small [name]",
)
STYLE_TEMPLATES = (
    "a painting in the style of [name]",
    "a rendering in the style of [name]",
    "a cropped painting in the style of [name]",
    "the painting in the style of [name]",
    "a clean painting in the style of [name]",
    "a dirty painting in the style of [name]",
    "a dark painting in the style of [name]",
    "a picture in the style of [name]",
    "a cool painting in the style of [name]",
    "a close-up painting in the style of [name]",
    "a bright painting in the style of [name]",
    "a cropped painting in the style of [name]",
    "a good painting in the style of [name]",
    "a close-up painting in the style of [name]",
    "a rendition in the style of [name]",
    "a nice painting in the style of [name]",
    "a small painting in the style of [name]",
    "a weird painting in the style of [name]",
    "a large painting in the style of [name]",
)
# Names: the webui's template files and the values of diffusers' `learnable_property`.
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "object": OBJECT_TEMPLATES,
    "subject": OBJECT_TEMPLATES,
    "style": STYLE_TEMPLATES,
    "object_filewords": tuple(f"{template}, [filewords]" for template in OBJECT_TEMPLATES),
    "subject_filewords": tuple(f"{template}, [filewords]" for template in OBJECT_TEMPLATES),
    "style_filewords": tuple(
        template.replace(" in the style of ", " of [filewords], in the style of ")
        for template in STYLE_TEMPLATES
    ),
    "hypernetwork": tuple(template.replace("[name]", "[filewords]") for template in OBJECT_TEMPLATES),
    "filewords": ("[filewords]",),
    "none": ("picture",),
}

_REMEDY = (
    "Set data.instance_prompt, put a .txt file with the caption beside each image (`dreamfleet data caption` writes "
    "them), or set data.caption_from_filename: true"
)
_LEADING_NUMBER = re.compile(r"^[-\d]+\s*")  # the webui's rule


class NoCaption(DataError):
    """An image that has neither a caption nor a prompt."""


def make_caption(
    caption: str | None,
    *,
    template: str | None = None,
    prompt: str | None = None,
    name: str = "",
    file_name: str | None = None,
    rng: np.random.Generator,
    config: DataConfig,
    of_subject: bool = True,
) -> str:
    """Return the text for one use of an image in training.

    `caption` is the image's caption (or None), `prompt` that of its concept (`instance_prompt`), `template` a line with
    `[name]` and `[filewords]` (the caption). The first of these that applies is used: the template, filled in; the
    prompt, filled in, if it contains `[filewords]`; the caption with prefix and suffix, its tags shuffled and dropped
    according to `config`; the prompt. With `config.caption_from_filename`, an image without a caption gets the one in
    `file_name`. With probability `config.caption_dropout` the result is "". No option changes the captions of class
    images (`of_subject` is false). All random numbers are drawn first and in the same order, so that one option does
    not change the effect of another. Raises NoCaption if there is neither a caption nor a prompt.
    """
    dropped = rng.random() < config.caption_dropout
    words = choose_caption(caption, rng) if caption and config.use_captions else None
    if words is None and config.caption_from_filename and of_subject:
        words = caption_from_filename(file_name or "") or None
    if words is not None and of_subject:
        words = " ".join(part for part in (config.caption_prefix, words, config.caption_suffix) if part)
        words = process_tags(words, rng, config)
    if dropped and of_subject:
        return ""
    if template is not None:
        if words is None and prompt is not None:
            words = fill_template(prompt, name, "").strip() or None
        if words is None and "[filewords]" in template:
            raise NoCaption(f"no caption for [filewords]: image {file_name or '?'}. {_REMEDY}")
        return fill_template(template, name, words or "")
    if prompt is not None and words is None:
        words = fill_template(prompt, name, "").strip()
    elif prompt is not None and "[filewords]" in prompt:
        words = fill_template(prompt, name, words or "")
    if not words:
        raise NoCaption(
            f"no caption: image {file_name or '?'} has none, and its concept no prompt. {_REMEDY}"
        )
    return words


def process_tags(caption: str, rng: np.random.Generator, config: DataConfig) -> str:
    """Shuffle and drop the comma-separated tags of a caption, except those that `config` keeps in place."""
    separator = config.keep_tokens_separator
    first, found, rest = caption.partition(separator) if separator else (caption, "", "")
    if not found:
        return _shuffle_and_drop(caption, rng, config, keep=config.keep_tokens)
    middle, _, last = rest.partition(separator)
    parts = (first, _shuffle_and_drop(middle, rng, config, keep=0), last)
    return ", ".join(tag for part in parts for tag in split_tags(part))


def choose_caption(caption: str, rng: np.random.Generator) -> str:
    """Return a random line of a caption, whose lines are alternative captions of the image."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    if len(lines) < 2:
        return lines[0] if lines else ""
    return lines[int(rng.integers(len(lines)))]


def choose_template(templates: Sequence[str], rng: np.random.Generator) -> str:
    """Return a random template; all are equally likely."""
    return templates[int(rng.integers(len(templates)))]


def fill_template(template: str, name: str, filewords: str) -> str:
    """Replace `[filewords]`, then `[name]` (in the webui's order), and `{}` (the paper's placeholder for the name)."""
    filled = template.replace("[filewords]", filewords).replace("[name]", name)
    return filled.replace("{}", name)


def split_tags(caption: str) -> list[str]:
    """Return the comma-separated tags of a caption, stripped, without empty ones."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def shuffle_tags(caption: str, rng: np.random.Generator, keep_tokens: int = 0) -> str:
    """Shuffle comma-separated tags; the first `keep_tokens` stay in front."""
    tags = split_tags(caption)
    kept, rest = tags[:keep_tokens], tags[keep_tokens:]
    return ", ".join(kept + [rest[i] for i in rng.permutation(len(rest))])


def drop_tags(caption: str, rng: np.random.Generator, rate: float, keep_tokens: int = 0) -> str:
    """Drop each comma-separated tag with probability `rate`, but never the first `keep_tokens`."""
    tags = split_tags(caption)
    kept, rest = tags[:keep_tokens], tags[keep_tokens:]
    draws = rng.random(len(rest))
    return ", ".join(kept + [tag for tag, draw in zip(rest, draws, strict=True) if draw >= rate])


def _shuffle_and_drop(caption: str, rng: np.random.Generator, config: DataConfig, *, keep: int) -> str:
    if config.tag_dropout > 0:
        caption = drop_tags(caption, rng, config.tag_dropout, keep)
    return shuffle_tags(caption, rng, keep) if config.shuffle_tags else caption


def caption_from_filename(file_name: str) -> str:
    """Return the caption in a file name, by the webui's rule: the stem without leading digits and dashes.

    `01-a red apple.png` gives `a red apple`.
    """
    stem = file_name.replace("\\", "/").rsplit("/", 1)[-1]
    if "." in stem.lstrip("."):
        stem = stem.rsplit(".", 1)[0]
    return _LEADING_NUMBER.sub("", stem)
