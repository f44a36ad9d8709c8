"""The fidelity score on planted images: what it rewards, and each of its penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from colour_scorer import GREEN, HALF, RED, YELLOW, ColourScorer, plain
from PIL import Image

from dreamfleet.trainers.config.metrics import METRICS
from dreamfleet.trainers.evaluation.fidelity import BACKGROUND, ScoredImages
from dreamfleet.trainers.evaluation.fidelity_score import COPY_WEIGHT, PROMPT_WEIGHT, fidelity
from dreamfleet.trainers.evaluation.judge import score_images

ORANGE, BROWN, BLUE = (180, 60, 0), (120, 80, 0), (0, 0, 200)


def score(images: Sequence[Image.Image], **changes: Any) -> dict[str, list[float]]:
    """Score images by colour; by default of a red subject, trained on orange and brown images."""
    fields: dict[str, Any] = {
        "prompts": ["red"] * len(images),
        "real": plain(RED, ORANGE),
        "clip": ColourScorer(),
        "training": plain(ORANGE, BROWN),
        "base": plain(*[YELLOW] * len(images)),
    }
    found = fidelity(ScoredImages(images, **{**fields, **changes}))
    return {name: values.tolist() for name, values in found.items()}


def test_the_score_is_the_subject_minus_the_penalties() -> None:
    found = score(plain(RED, GREEN), class_images=plain(RED), base_class_images=plain(YELLOW))
    assert found.keys() == {"fidelity", *METRICS.get("fidelity").parts}
    penalties = (found[f"fidelity_{name}"] for name in ("prompt", "copy", "class"))
    for value, subject, *lost in zip(found["fidelity"], found["fidelity_subject"], *penalties, strict=True):
        assert value == pytest.approx(subject - sum(lost))
    assert found["fidelity_subject"][0] > 0.9 and found["fidelity_class"][0] > 0


def test_likeness_is_the_mean_of_the_judges() -> None:
    class Blind(ColourScorer):
        def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
            return torch.eye(2)[[0] * len(images)]

    one = score(plain(YELLOW), real=plain(RED, RED))["fidelity_subject"]
    both = score(plain(YELLOW), real=plain(RED, RED), dino=Blind())["fidelity_subject"]
    assert one == pytest.approx([HALF]) and both == pytest.approx([(HALF + 1) / 2])


def test_a_copied_training_image_is_penalised() -> None:
    copy, new = score(plain(BROWN, RED), prompts=["green", "red"])["fidelity_copy"]
    assert copy == pytest.approx(COPY_WEIGHT) and new == 0
    # A preview may be as near to a training image as a held-out image is.
    near, nearer = (150, 70, 0), (140, 74, 0)
    found = score(plain(near, nearer), real=plain(near), training=plain(BROWN, BLUE))["fidelity_copy"]
    assert found[0] == 0 < found[1] < COPY_WEIGHT
    assert score(plain(BROWN), real=plain(BROWN), training=plain(BROWN))["fidelity_copy"] == [0]


def test_an_ignored_prompt_loses_against_the_untuned_model() -> None:
    prompts = ["blue", "blue", "red", "red"]
    blue_or_red = plain(BLUE, BLUE, RED, RED)
    before = score(blue_or_red, prompts=prompts, base=blue_or_red)
    after = score(plain(RED, RED, RED, RED), prompts=prompts, base=blue_or_red)
    assert after["fidelity_subject"][0] > before["fidelity_subject"][0]
    assert after["fidelity_prompt"] == pytest.approx([PROMPT_WEIGHT, PROMPT_WEIGHT, 0, 0])
    assert sum(after["fidelity"]) < sum(before["fidelity"]) and before["fidelity_prompt"] == [0, 0, 0, 0]
    # The mean of a prompt's images counts, and a loss of less than a tenth is within the floor.
    slightly = score(plain(RED, (200, 60, 0)), base=plain(RED, RED))
    assert slightly["fidelity_prompt"] == [0, 0]


def test_a_class_that_becomes_the_subject_is_penalised() -> None:
    drifted = score(
        plain(RED), real=plain(RED, RED), class_images=plain(RED), base_class_images=plain(YELLOW)
    )
    assert drifted["fidelity_class"] == pytest.approx([1 - HALF])
    away = score(plain(RED), class_images=plain(GREEN), base_class_images=plain(YELLOW))
    assert away["fidelity_class"] == [0] == score(plain(RED))["fidelity_class"]


def test_the_background_of_a_masked_subject_does_not_count() -> None:
    def on(background: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGB", (8, 8), background)
        image.paste(RED, (0, 0, 4, 8))
        return image

    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    found = [
        score(plain(RED), real=[on(colour), on(colour)], masks=[mask, mask])["fidelity_subject"]
        for colour in (GREEN, BLUE)
    ]
    assert found[0] == found[1]
    unmasked = score(plain(RED), real=[on(GREEN), on(GREEN)], masks=[None, Image.new("L", (8, 8), 0)])
    assert unmasked["fidelity_subject"] == score(plain(RED), real=[on(GREEN)] * 2)["fidelity_subject"]
    grey = ScoredImages([], real=[on(GREEN)], masks=[mask]).subject[0]
    assert grey.getpixel((7, 0)) == BACKGROUND and grey.getpixel((0, 0)) == RED


def test_previews_that_are_not_finite_count_as_unlike_everything() -> None:
    class Broken(ColourScorer):
        def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
            features = super().image_features(images)
            features[[not np.asarray(image).any() for image in images]] = float("nan")
            return features

    found = score(plain((0, 0, 0), RED), prompts=["blue", "red"], clip=Broken(), base=plain(BLUE, RED))
    assert found["fidelity"][0] == pytest.approx(-PROMPT_WEIGHT) and found["fidelity"][1] > 0.9
    black = score(plain(RED), clip=Broken(), class_images=plain((0, 0, 0)), base_class_images=plain(YELLOW))
    assert np.isfinite(black["fidelity"]).all()


def test_the_score_is_computed_with_its_parts_if_its_needs_are_given() -> None:
    clip: Any = ColourScorer()
    options: dict[str, Any] = {"prompts": ["red"], "real": plain(RED, ORANGE), "clip": clip}
    assert "fidelity" not in score_images(plain(RED), **options).means
    found = score_images(plain(RED), **options, training=plain(ORANGE, BROWN), base=plain(YELLOW))
    assert found.means.keys() >= {"fidelity", "fidelity_subject", "clip_i"}
    assert found.images[0]["fidelity_subject"] == found.means["fidelity_subject"]
