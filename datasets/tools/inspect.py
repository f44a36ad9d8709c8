"""Surveys the images of a recipe as a run would use them: sizes, crops, copies, captions, warnings. Needs no model."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dreamfleet.datasets.buckets import Size, training_sizes
from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Row
from dreamfleet.datasets.index.sets import Sets, load_class_images, load_sets
from dreamfleet.datasets.processing.mapping import mapper_of
from dreamfleet.datasets.processing.runner import Workers
from dreamfleet.datasets.tools.pixel_statistics import copies, examine_all, near_copies

NEARLY_ALL_CUT_OFF = 0.9  # fraction of an image's area that its crop removes
MUCH_CUT_OFF = 0.2  # fraction that crops remove, mean over images

Three = tuple[int, int, int]  # smallest, median, largest


@dataclasses.dataclass(frozen=True)
class Survey:
    """Properties of an image set. Images are named by URI; sizes are in pixels, after the EXIF rotation."""

    pictures: int
    draws: int  # number of uses of images per epoch, with repeats
    class_pictures: dict[str, int]
    megapixels: float  # sum over all images
    width: Three
    height: Three
    shown_at: dict[str, int]  # training size, such as "512x512" -> number of images
    enlarged: int
    largest_scale: float
    cut_off: float  # fraction of an image's area that is cropped, mean over images
    most_cut_off: float
    formats: dict[str, int]
    profiles: dict[str, int]  # colour profile that is converted to sRGB -> number of images
    masks: int
    transparent: int
    turned: int
    grey: int
    captioned: int
    tokens: Three  # number of tokens of the longest caption of each image
    tokenizer: str
    max_tokens: int
    tags: dict[str, int]  # tag -> number of captions, most frequent first
    copies: list[list[str]]
    near: list[list[str]]
    bad: dict[str, str]  # file -> reason
    skipped: list[dict[str, Any]]  # deliberately skipped files: place, reason, number of files
    others: dict[str, int]  # extension -> number of other files
    shared: dict[str, list[str]]  # caption file -> images that share it
    extreme: dict[str, str]  # image of which the crop removes nearly all -> its size and enlargement
    wordless: list[str]  # images without a caption or a prompt
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the survey as plain JSON values, for `--json`."""
        return dataclasses.asdict(self)


def survey(
    data: DataConfig,
    *,
    count_tokens: Callable[[str], int],
    tokenizer: str = "",
    max_tokens: int = 75,
    excluded: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
    workers: Workers = Workers(),  # noqa: B008 - frozen
) -> Survey:
    """Survey all images that a `data:` section names, reading them with the code that training uses.

    ``count_tokens(text)`` returns the number of tokens of a caption. ``workers`` examine the images. Raises
    DataError as a run would, for example if there is no usable image.
    """
    sets = load_sets(data, verify=True, excluded=excluded, mapper=mapper_of(workers))
    rows = sets.instances.rows()
    facts = list(examine_all(rows, data.max_pixels, progress, workers))
    sizes = training_sizes(sets.instances.sizes(), data)
    scales, losses = _scales_and_losses(rows, sizes)
    captions = _used_captions(rows, data, sets)
    lengths = [max(count_tokens(line) for line in caption.splitlines()) for caption in captions]
    found = Survey(
        pictures=len(rows),
        draws=round(sum(row.repeats + row.fraction for row in rows)),
        class_pictures=_class_images(data, sets),
        megapixels=sum(row.width * row.height for row in rows) / 1e6,
        width=_three([row.width for row in rows]),
        height=_three([row.height for row in rows]),
        shown_at={f"{width}x{height}": count for (width, height), count in sorted(Counter(sizes).items())},
        enlarged=sum(scale > 1 for scale in scales),
        largest_scale=max(scales),
        cut_off=max(0.0, statistics.fmean(losses)),
        most_cut_off=max(0.0, *losses),
        formats=dict(Counter(one.format for one in facts).most_common()),
        profiles=dict(Counter(one.profile for one in facts if one.profile).most_common()),
        masks=sum(row.mask is not None for row in rows),
        transparent=sum(one.transparent for one in facts),
        turned=sum(one.turned for one in facts),
        grey=sum(one.grey for one in facts),
        captioned=len(captions),
        tokens=_three(lengths or [0]),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        tags=tag_counts(captions),
        copies=copies(rows),
        near=near_copies(rows, facts),
        bad={item.uri: item.reason for item in sets.instances.bad},
        skipped=[item._asdict() for item in sets.instances.skipped],
        others=dict(sets.instances.others.most_common()),
        shared=sets.instances.shared,
        extreme=_extreme(rows, scales, losses),
        wordless=[row.uri for row in rows if not _has_caption(row, data, sets)],
        warnings=[],
    )
    too_long = sum(length > max_tokens for length in lengths)
    return dataclasses.replace(found, warnings=list(_warnings(found, data, sets, too_long)))


def tag_counts(captions: Sequence[str]) -> dict[str, int]:
    """Return the number of captions with each comma-separated tag, most frequent first, then alphabetically."""
    counts = Counter(
        tag
        for caption in captions
        for tag in dict.fromkeys(t for line in caption.splitlines() for t in split_tags(line))
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _scales_and_losses(rows: Sequence[Row], sizes: Sequence[Size]) -> tuple[list[float], list[float]]:
    """Return the factor by which each image is enlarged, and the fraction of its area that is cropped."""
    pairs = list(zip(rows, sizes, strict=True))
    scales = [max(size[0] / row.width, size[1] / row.height) for row, size in pairs]
    losses = [
        1 - (size[0] * size[1]) / (scale * scale * row.width * row.height)
        for (row, size), scale in zip(pairs, scales, strict=True)
    ]
    return scales, losses


def _extreme(rows: Sequence[Row], scales: Sequence[float], losses: Sequence[float]) -> dict[str, str]:
    """Return what becomes of the images of which a crop removes nearly all, by URI."""
    return {
        row.uri: f"{row.width} x {row.height} pixels, {loss:.0%} cut off, the rest enlarged {scale:.1f} times"
        for row, scale, loss in zip(rows, scales, losses, strict=True)
        if loss > NEARLY_ALL_CUT_OFF
    }


def _used_captions(rows: Sequence[Row], data: DataConfig, sets: Sets) -> list[str]:
    uses = [data.for_set(concept).use_captions for concept in sets.concepts]
    return [row.caption for row in rows if row.caption and uses[row.concept]]


def _has_caption(row: Row, data: DataConfig, sets: Sets) -> bool:
    options = data.for_set(sets.concepts[row.concept])
    own = (row.caption and options.use_captions) or options.caption_from_filename
    return bool(own or sets.concepts[row.concept].instance_prompt)


def _three(values: Sequence[int]) -> Three:
    return min(values), int(statistics.median_low(values)), max(values)


def _class_images(data: DataConfig, sets: Sets) -> dict[str, int]:
    folders = [one.folder for one in sets.class_sets if one.folder is not None]
    found = {folder: load_class_images(folder, data, verify=False) for folder in dict.fromkeys(folders)}
    return {folder: len(index) if index is not None else 0 for folder, index in found.items()}


def _warnings(found: Survey, data: DataConfig, sets: Sets, too_long: int) -> Iterator[str]:
    """Yield warnings with a remedy, the most serious first."""
    if found.bad:
        yield f"{_count(len(found.bad), 'file')} cannot be used: replace or remove the files listed above"
    if found.enlarged:
        yield (
            f"{_count(found.enlarged, 'image')} below the training size, enlarged up to "
            f"{found.largest_scale:.2f} times: use larger images, a lower data.resolution, or data.enable_bucket with "
            "data.bucket_no_upscale"
        )
    if found.cut_off > MUCH_CUT_OFF:
        remedy = (
            "bucket limits closer to the images' shapes" if data.enable_bucket else "data.enable_bucket: true"
        )
        yield (
            f"crops remove {found.cut_off:.0%} of an image on average: set {remedy}, or crop with "
            "`dreamfleet data prepare --mode smart`"
        )
    if found.extreme:
        place, details = next(iter(found.extreme.items()))
        yield (
            f"{_count(len(found.extreme), 'image')} of an extreme shape, such as {place} ({details}): crop or remove "
            "them"
        )
    if lone := sum(count == 1 for count in found.shown_at.values()) if data.enable_bucket else 0:
        yield f"{_count(lone, 'bucket')} of a single image, which its batches repeat: set larger bucket_reso_steps"
    if found.copies:
        extra = sum(len(group) - 1 for group in found.copies)
        yield f"{_count(extra, 'copy', 'copies')} of another image, which is used more often: remove them"
    if found.near:
        yield f"{_count(len(found.near), 'group')} of near duplicates: keep the best of each"
    if found.transparent and not data.alpha_mask:
        yield (
            f"{_count(found.transparent, 'image')} with transparent parts, composited over white: data.alpha_mask: "
            "true excludes these from the loss"
        )
    if found.masks and not data.alpha_mask:
        yield f"{_count(found.masks, 'mask')} that are not used: set data.alpha_mask: true"
    if 0 < found.grey < found.pictures:
        yield f"{_count(found.grey, 'grey image')} among colour images: remove them, or mention it in their captions"
    yield from _caption_warnings(found, data, sets, too_long)


def _caption_warnings(found: Survey, data: DataConfig, sets: Sets, too_long: int) -> Iterator[str]:
    bare = found.pictures - found.captioned
    if found.wordless:
        yield (
            f"{_count(len(found.wordless), 'image')} without caption, such as {found.wordless[0]}: write a .txt file "
            "beside each (`dreamfleet data caption`), or set data.instance_prompt"
        )
    elif bare and found.captioned:
        yield f"{_count(bare, 'image')} without a caption, trained with the instance_prompt"
    if too_long:
        yield (
            f"{_count(too_long, 'caption')} of more than {found.max_tokens} tokens, which are cut: shorten them, or "
            "set model.max_token_length to 150 or 225"
        )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
