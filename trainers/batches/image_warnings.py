"""Logs warnings about the images and captions of a run, once, before it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from dreamfleet.datasets.buckets import Size, describe_buckets, most_enlarged
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Index, log_left_out
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.image_method import ImageMethod

log = logging.getLogger(__name__)


def log_findings(index: Index, sizes: Sequence[Size], method: Method, data: DataConfig) -> None:
    """Log images that are left out or enlarged many times, and captions that are cut at the token limit."""
    log_left_out(index)
    enlarged, largest, row = most_enlarged(index.sizes(), sizes)
    if enlarged:
        log.warning(
            "%d images are enlarged strongly, up to %.0f times (%s): remove them, or lower data.resolution",
            enlarged,
            largest,
            index.row(row).uri,
        )
    if isinstance(method, ImageMethod) or not isinstance(method, DiffusionMethod):
        return
    if not method.model.tokenizers:
        return
    tokenizer, most = method.model.tokenizers[0], method.model.max_token_length
    count, longest, uri = too_long(
        captions_of(index, method, data),
        lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids),
        most,
    )
    if count:
        log.warning(
            "%d captions are longer than %d tokens and are truncated; the longest has %d (%s). Shorten them, or set "
            "model.max_token_length to 150 or 225",
            count,
            most,
            longest,
            uri,
        )


def log_buckets(sizes: Sequence[Size], smallest_bucket: int, global_batch: int) -> None:
    """Log how many images each bucket has, with a warning if the smallest bucket does not fill a batch."""
    log.info("buckets: %s", describe_buckets(sizes))
    if smallest_bucket < global_batch:
        log.warning(
            "the smallest bucket has %d images and a batch has %d, so its batches repeat images. Increase "
            "data.bucket_reso_steps, or reduce the batch size",
            smallest_bucket,
            global_batch,
        )


def captions_of(index: Index, method: DiffusionMethod, data: DataConfig) -> Iterable[tuple[str, str]]:
    """Yield the address of each image and its longest caption line with prefix and suffix.

    An image without a caption has its concept's prompt instead, and is left out if there is none.
    """
    prompts = [concept.instance_prompt for concept in method.setting.concepts]
    options = [data.for_set(concept) for concept in method.setting.concepts]
    for uri, caption, concept in index.lazily(("uri", "caption", "concept"), lambda *values: values):
        own = options[concept] if options else data
        if caption and own.use_captions:
            line = max(caption.splitlines(), key=len)
            yield uri, " ".join(part for part in (own.caption_prefix, line, own.caption_suffix) if part)
        elif prompt := prompts[concept]:
            yield uri, prompt


def too_long(
    captions: Iterable[tuple[str, str]], count_tokens: Callable[[str], int], most: int
) -> tuple[int, int, str]:
    """Return how many captions have more than ``most`` tokens, the longest's token count, and its image."""
    known: dict[str, int] = {}
    found, longest, where = 0, 0, ""
    for uri, text in captions:
        if len(text.encode()) <= most:  # no token is shorter than a byte
            continue
        if text not in known:
            known[text] = count_tokens(text)
        if known[text] > most:
            found += 1
            if known[text] > longest:
                longest, where = known[text], uri
    return found, longest, where
