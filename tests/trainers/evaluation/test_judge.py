"""Scores of images by every metric whose needs are given."""

from __future__ import annotations

from typing import Any

import pytest
from colour_scorer import GREEN, HALF, RED, YELLOW, ColourScorer, plain

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.evaluation.judge import score_images


def test_scores_of_every_image_and_their_means() -> None:
    clip: Any = ColourScorer()
    images, real = plain(RED, YELLOW), plain(RED, GREEN)
    scores = score_images(
        images, prompts=["red qzx", "green qzx"], real=real, clip=clip, dino=clip, strip=["qzx"]
    )
    fidelity = pytest.approx((1 + 2 * HALF) / 4)
    assert scores.means == {"clip_i": fidelity, "clip_t": pytest.approx((1 + HALF) / 2), "dino": fidelity}
    assert [image["clip_t"] for image in scores.images] == [pytest.approx(1), pytest.approx(HALF)]
    assert [image["prompt"] for image in scores.images] == ["red qzx", "green qzx"]
    chosen = score_images(images, metrics=["clip_t"], prompts=["red"], real=real, clip=clip)
    assert chosen.means.keys() == {"clip_t"}


def test_only_metrics_whose_needs_are_given_are_computed() -> None:
    clip: Any = ColourScorer()
    assert score_images(plain(RED, GREEN), prompts=["red"], clip=clip).means == {"clip_t": pytest.approx(0.5)}
    with pytest.raises(UserError, match="real image"):
        score_images(plain(RED), clip=clip)
    with pytest.raises(UserError, match="no images"):
        score_images([], prompts=["a"], clip=clip)
    with pytest.raises(UserError, match=r"3 .*prompt"):
        score_images(plain(RED, RED, RED), prompts=["a", "b"], clip=clip)
