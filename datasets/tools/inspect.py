"""What a run would see of its pictures: sizes, crops, copies, captions, and what a person had better mend. No model."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.sets import Sets, load_class_images, load_sets
from dreamfleet.datasets.tools.pixel_statistics import copies, look_at_all, near_copies

NEARLY_ALL_CUT_OFF = 0.9  # of one picture
MUCH_CUT_OFF = 0.2  # part of a picture that the crop takes away, on average

Three = tuple[int, int, int]  # smallest, median, largest


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a run would see. Places are addresses; sizes are in pixels, after the EXIF turn."""

    pictures: int
    draws: int  # uses of pictures an epoch: repeats counted
    class_pictures: dict[str, int]
    megapixels: float  # all pictures together
    width: Three
    height: Three
    shown_at: dict[str, int]  # "512x512" -> pictures
    enlarged: int
    largest_scale: float
    cut_off: float  # part of a picture's area, mean over pictures
    most_cut_off: float
    formats: dict[str, int]
    profiles: dict[str, int]  # colour profiles that are converted to sRGB
    masks: int
    transparent: int
    turned: int
    grey: int
    captioned: int
    tokens: Three  # of the longest caption of each picture
    tokenizer: str
    max_tokens: int
    tags: dict[str, int]  # most frequent first
    copies: list[list[str]]
    near: list[list[str]]
    bad: dict[str, str]  # file -> reason
    skipped: list[dict[str, Any]]  # what is rightly passed over: place, reason, files
    others: dict[str, int]  # files that are no images, by ending
    shared: dict[str, list[str]]  # caption file -> the images that all read it
    extreme: dict[
        str, str
    ]  # images of which nearly all is cut off: their size, and how much they are enlarged
    wordless: list[str]  # images without a caption, where no prompt stands in
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return dataclasses.asdict(self)


def survey(
    data: DataConfig,
    *,
    count_tokens: Callable[[str], int],
    tokenizer: str = "",
    max_tokens: int = 75,
    apart: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read all pictures a recipe's `data:` section names, with the code that training reads them by.

    ``count_tokens(text)`` measures captions. Raises DataError as a run would, when there is no usable picture.
    """
    sets = load_sets(data, verify=True, apart=apart)
    rows = sets.instances.rows()
    looks = list(look_at_all(rows, data.max_pixels, progress))
    sizes = training_sizes(sets.instances.sizes(), data)
    pairs = list(zip(rows, sizes, strict=True))
    scales = [max(size[0] / row.width, size[1] / row.height) for row, size in pairs]
    losses = [
        1 - (size[0] * size[1]) / (scale * scale * row.width * row.height)
        for (row, size), scale in zip(pairs, scales, strict=True)
    ]
    captions = [row.caption for row in rows if row.caption and data.use_captions]
    lengths = [max(count_tokens(line) for line in caption.splitlines()) for caption in captions]
    same, near = copies(rows), near_copies(rows, looks)
    found = Survey(
        pictures=len(rows),
        draws=sum(row.repeats for row in rows),
        class_pictures=_class_images(data, sets),
        megapixels=sum(row.width * row.height for row in rows) / 1e6,
        width=_three([row.width for row in rows]),
        height=_three([row.height for row in rows]),
        shown_at={f"{width}x{height}": count for (width, height), count in sorted(Counter(sizes).items())},
        enlarged=sum(scale > 1 for scale in scales),
        largest_scale=max(scales),
        cut_off=max(0.0, statistics.fmean(losses)),
        most_cut_off=max(0.0, *losses),
        formats=dict(Counter(look.format for look in looks).most_common()),
        profiles=dict(Counter(look.profile for look in looks if look.profile).most_common()),
        masks=sum(row.mask is not None for row in rows),
        transparent=sum(look.transparent for look in looks),
        turned=sum(look.turned for look in looks),
        grey=sum(look.grey for look in looks),
        captioned=len(captions),
        tokens=_three(lengths or [0]),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        tags=tag_counts(captions),
        copies=same,
        near=near,
        bad={item.uri: item.reason for item in sets.instances.bad},
        skipped=[item._asdict() for item in sets.instances.skipped],
        others=dict(sets.instances.others.most_common()),
        shared=sets.instances.shared,
        extreme={
            row.uri: f"{row.width} x {row.height} pixels, {loss:.0%} cut off, the rest enlarged {scale:.1f} times"
            for (row, _), scale, loss in zip(pairs, scales, losses, strict=True)
            if loss > NEARLY_ALL_CUT_OFF
        },
        wordless=[
            row.uri
            for row in rows
            if not (row.caption and data.use_captions)
            and not data.caption_from_filename
            and not sets.concepts[row.concept].instance_prompt
        ],
        warnings=[],
    )
    too_long = sum(length > max_tokens for length in lengths)
    return dataclasses.replace(found, warnings=list(_warnings(found, data, sets, too_long)))


def tag_counts(captions: Sequence[str]) -> dict[str, int]:
    """Count in how many captions each comma-separated tag stands: most frequent first, then by alphabet."""
    counts = Counter(
        tag
        for caption in captions
        for tag in dict.fromkeys(t for line in caption.splitlines() for t in split_tags(line))
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _three(values: Sequence[int]) -> Three:
    return min(values), int(statistics.median_low(values)), max(values)


def _class_images(data: DataConfig, sets: Sets) -> dict[str, int]:
    folders = [one.folder for one in sets.class_sets if one.folder is not None]
    found = {folder: load_class_images(folder, data, verify=False) for folder in dict.fromkeys(folders)}
    return {folder: len(index) if index is not None else 0 for folder, index in found.items()}


def _warnings(found: Survey, data: DataConfig, sets: Sets, too_long: int) -> Iterator[str]:
    """Say what is amiss and the way out, the gravest first."""
    if found.bad:
        yield f"{_count(len(found.bad), 'file')} cannot be used: replace or remove what is listed above"
    if found.enlarged:
        yield (
            f"{_count(found.enlarged, 'picture')} smaller than what is trained on, enlarged up to "
            f"{found.largest_scale:.2f} times: use larger ones, a lower data.resolution, or data.enable_bucket with "
            "data.bucket_no_upscale"
        )
    if found.cut_off > MUCH_CUT_OFF:
        way_out = (
            "limits nearer to the pictures' shapes" if data.enable_bucket else "data.enable_bucket: true"
        )
        yield (
            f"the crop takes {found.cut_off:.0%} of a picture: set {way_out}, or cut them by "
            "`dreamfleet data prepare --mode smart`"
        )
    if found.extreme:
        place, told = next(iter(found.extreme.items()))
        yield (
            f"{_count(len(found.extreme), 'picture')} of an extreme shape, such as {place} ({told}): crop by hand, or "
            "remove"
        )
    if lone := sum(count == 1 for count in found.shown_at.values()) if data.enable_bucket else 0:
        yield f"{_count(lone, 'bucket')} of a single picture: its batches repeat it; set larger bucket_reso_steps"
    if found.copies:
        extra = sum(len(group) - 1 for group in found.copies)
        yield f"{_count(extra, 'copy', 'copies')} of another picture: it counts more often; remove them"
    if found.near:
        yield f"{_count(len(found.near), 'group')} of nearly the same pictures: keep the best of each"
    if found.transparent and not data.alpha_mask:
        yield (
            f"{_count(found.transparent, 'picture')} with transparent parts, laid over white: data.alpha_mask: true "
            "keeps those out of the loss"
        )
    if found.masks and not data.alpha_mask:
        yield f"{_count(found.masks, 'mask')} not used: set data.alpha_mask: true"
    if 0 < found.grey < found.pictures:
        yield f"{_count(found.grey, 'grey picture')} among coloured ones: remove them, or say so in their captions"
    yield from _caption_warnings(found, data, sets, too_long)


def _caption_warnings(found: Survey, data: DataConfig, sets: Sets, too_long: int) -> Iterator[str]:
    bare = found.pictures - found.captioned
    if found.wordless:
        yield (
            f"{_count(len(found.wordless), 'picture')} without words, such as {found.wordless[0]}: write a .txt file "
            "beside each (`dreamfleet data caption`), or set data.instance_prompt"
        )
    elif bare and found.captioned:
        yield f"{_count(bare, 'picture')} without a caption of its own: the instance_prompt stands in"
    if too_long:
        yield (
            f"{_count(too_long, 'caption')} of more than {found.max_tokens} tokens, cut there: shorten, or set "
            "model.max_token_length to 150 or 225"
        )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
