"""What a run would see of its pictures: sizes, crops, copies, captions, and what a person had better mend. No model."""

from __future__ import annotations

import dataclasses
import io
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamfleet.datasets.buckets import picture_sizes
from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.images import MAX_PIXELS, PICTURE_SUFFIXES, open_with_alpha
from dreamfleet.datasets.index import Row
from dreamfleet.datasets.sets import Sets, load_sets
from dreamfleet.datasets.storage import Storage, read_uri

ORIENTATION_TAG = 0x0112
GREY_WITHIN = 3  # the channels of a grey picture differ by no more, of 255
NEAR_BITS = 4  # pictures whose hashes differ in no more of 64 bits are nearly the same
MUCH_CUT_OFF = 0.2  # part of a picture that the crop takes away, on average
PAIRS_AT_ONCE = 2**22  # of hashes that are compared: 32 MB

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
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return dataclasses.asdict(self)


class Look(NamedTuple):
    """What the pixels of one picture tell."""

    format: str
    transparent: bool
    turned: bool
    grey: bool
    hash: int


def survey(
    data: DataConfig,
    *,
    count_tokens: Callable[[str], int],
    tokenizer: str = "",
    max_tokens: int = 75,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read all pictures a recipe's `data:` section names, with the code that training reads them by.

    ``count_tokens(text)`` measures captions. Raises DataError as a run would, when there is no usable picture.
    """
    sets = load_sets(data, verify=True)
    rows = sets.instances.rows()
    looks = list(_look_at_all(rows, data.max_pixels, progress))
    sizes = picture_sizes(sets.instances, data)
    pairs = list(zip(rows, sizes, strict=True))
    scales = [max(size[0] / row.width, size[1] / row.height) for row, size in pairs]
    losses = [
        1 - (size[0] * size[1]) / (scale * scale * row.width * row.height)
        for (row, size), scale in zip(pairs, scales, strict=True)
    ]
    captions = [row.caption for row in rows if row.caption and data.use_captions]
    lengths = [max(count_tokens(line) for line in caption.splitlines()) for caption in captions]
    copies, near = _copies(rows), near_copies(rows, looks)
    found = Survey(
        pictures=len(rows),
        draws=sum(row.repeats for row in rows),
        class_pictures=_class_pictures(sets),
        megapixels=sum(row.width * row.height for row in rows) / 1e6,
        width=_three([row.width for row in rows]),
        height=_three([row.height for row in rows]),
        shown_at={f"{width}x{height}": count for (width, height), count in sorted(Counter(sizes).items())},
        enlarged=sum(scale > 1 for scale in scales),
        largest_scale=max(scales),
        cut_off=max(0.0, statistics.fmean(losses)),
        most_cut_off=max(0.0, *losses),
        formats=dict(Counter(look.format for look in looks).most_common()),
        masks=sum(row.mask is not None for row in rows),
        transparent=sum(look.transparent for look in looks),
        turned=sum(look.turned for look in looks),
        grey=sum(look.grey for look in looks),
        captioned=len(captions),
        tokens=_three(lengths or [0]),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        tags=tag_counts(captions),
        copies=copies,
        near=near,
        bad={item.uri: item.reason for item in sets.instances.bad},
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


def difference_hash(image: Image.Image) -> int:
    """Hash a picture to 64 bits that stay nearly the same under scaling and compression.

    The difference hash: whether each cell of an 8 x 8 grid is darker than its right neighbour.
    """
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def look_at(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> Look:
    """Decode a picture to tell what its header does not. DataError naming ``uri``."""
    rgb, alpha = open_with_alpha(data, uri=uri, max_pixels=max_pixels)
    small = np.asarray(rgb.resize((64, 64), Image.Resampling.BOX), dtype=np.int16)
    with Image.open(io.BytesIO(data)) as image:
        kind = str(image.format)
        try:
            turned = image.getexif().get(ORIENTATION_TAG, 1) in range(2, 9)
        except Exception:  # noqa: BLE001  broken EXIF data raise anything; the picture itself is good
            turned = False
    return Look(
        kind,
        alpha is not None and alpha.getextrema() != (255, 255),
        turned,
        int(np.ptp(small, axis=2).max()) <= GREY_WITHIN,
        difference_hash(rgb),
    )


def _look_at_all(
    rows: Sequence[Row], max_pixels: int, progress: Callable[[int, int], None] | None
) -> Iterator[Look]:
    def look(row: Row) -> Look:
        return look_at(read_uri(row.uri), uri=row.uri, max_pixels=max_pixels)

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="survey") as pool:
        for done, found in enumerate(pool.map(look, rows), 1):
            yield found
            if progress is not None:
                progress(done, len(rows))


def _three(values: Sequence[int]) -> Three:
    return min(values), int(statistics.median_low(values)), max(values)


def _class_pictures(sets: Sets) -> dict[str, int]:
    folders = [one.folder for one in sets.class_sets if one.folder is not None]
    return {
        folder: sum(name.lower().endswith(PICTURE_SUFFIXES) for name in Storage(folder).list("", True))
        for folder in dict.fromkeys(folders)
    }


def _copies(rows: Sequence[Row]) -> list[list[str]]:
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row.sha256, []).append(row.uri)
    return sorted(sorted(group) for group in places.values() if len(group) > 1)


def near_copies(rows: Sequence[Row], looks: Sequence[Look]) -> list[list[str]]:
    """Group pictures of different files whose hashes differ in a few bits, through any chain of such pairs."""
    firsts = {row.sha256: number for number, row in reversed(list(enumerate(rows)))}
    # A flat picture has no differences to hash.
    members = [number for number in sorted(firsts.values()) if looks[number].hash]
    # Many a set is of one scene: each hash is compared once, however many pictures have it.
    hashes, which = np.unique(
        np.array([looks[number].hash for number in members], dtype=np.uint64), return_inverse=True
    )
    leader = list(range(len(hashes)))

    def lead(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    at_once = max(1, PAIRS_AT_ONCE // max(1, len(hashes)))
    for start in range(0, len(hashes), at_once):
        block = hashes[start : start + at_once]
        apart = np.bitwise_count(block[:, None] ^ hashes[None, start:])
        for one, other in zip(*np.nonzero(apart <= NEAR_BITS), strict=True):
            if one < other:
                leader[lead(start + int(other))] = lead(start + int(one))
    groups: dict[int, list[str]] = {}
    for number, member in zip(which.tolist(), members, strict=True):
        groups.setdefault(lead(number), []).append(rows[member].uri)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


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
    if bare and not all(concept.instance_prompt for concept in sets.concepts):
        yield (
            f"{_count(bare, 'picture')} without words: write a .txt file beside each (`dreamfleet data caption`), or "
            "set data.instance_prompt"
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
