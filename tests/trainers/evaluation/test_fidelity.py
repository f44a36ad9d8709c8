"""CLIP-I, CLIP-T and DINO by the definitions of the DreamBooth paper, on known features."""

from __future__ import annotations

from typing import Any

import pytest
from colour_scorer import GREEN, HALF, RED, YELLOW, ColourScorer, plain

from dreamfleet.trainers.evaluation.fidelity import (
    ScoredImages,
    clip_i,
    clip_t,
    dino,
    spread_of_real,
    strip_words,
)


def test_definitions_of_the_paper() -> None:
    clip: Any = ColourScorer()
    pairs = ScoredImages(plain(RED, YELLOW), real=plain(RED, GREEN), clip=clip)
    assert clip_i(pairs).tolist() == pytest.approx([(1 + 0) / 2, (HALF + HALF) / 2])
    assert dino(ScoredImages(plain(RED), real=plain(YELLOW), dino=clip)).tolist() == pytest.approx([HALF])
    prompted = ScoredImages(plain(RED, YELLOW), ["a red sks", "a green cat"], clip=clip)
    assert clip_t(prompted).tolist() == pytest.approx([1, HALF])
    assert spread_of_real(clip, plain(RED, GREEN, YELLOW)) == pytest.approx((0 + HALF + HALF) / 3)
    assert spread_of_real(clip, plain(RED)) is None


@pytest.mark.parametrize(
    ("prompt", "words", "stripped"),
    [
        ("a sks cat on the beach", ["sks"], "a cat on the beach"),
        ("A SKS cat, sks", ["sks"], "A cat,"),
        ("a <my-cat> on the beach", {"<my-cat>": "cat"}, "a cat on the beach"),
        ("cat and cat-neg", {"cat-neg": "dog", "cat": "bird"}, "bird and dog"),
        ("a sksx cat", ["sks"], "a sksx cat"),
        ("photo of sks, sitting", ["sks"], "photo of, sitting"),
        ("as  it   is", [], "as  it   is"),
    ],
)
def test_words_unknown_to_clip_are_removed(prompt: str, words: Any, stripped: str) -> None:
    assert strip_words(prompt, words) == stripped
