"""The fidelity score on planted images: what it rewards, and each of its penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from colour_scorer import GREEN, RED, YELLOW, ColourScorer, plain
from PIL import Image

from dreamfleet.trainers.config.metrics import METRICS
from dreamfleet.trainers.evaluation.fidelity import BACKGROUND, ScoredImages
from dreamfleet.trainers.evaluation.fidelity_score import CLASS_WEIGHT, COPY_WEIGHT, PROMPT_WEIGHT, fidelity
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


def test_the_untuned_model_has_likeness_0_and_real_images_have_1() -> None:
    real = plain(RED, ORANGE)
    assert score(plain(YELLOW), base=plain(YELLOW))["fidelity"] == pytest.approx([0], abs=1e-6)
    alike = score(real, real=real, base=plain(YELLOW, YELLOW))["fidelity_subject"]
    assert sum(alike) / 2 > 1  # each is compared with itself, too
    one = score(plain((190, 30, 0)), real=real)["fidelity_subject"][0]
    assert 1 < one < 1.3 and score(plain(GREEN), real=real)["fidelity_subject"] == [-1]


def test_likeness_is_the_mean_of_the_judges() -> None:
    class Blind(ColourScorer):
        def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
            return torch.eye(2)[[0] * len(images)]

    options: dict[str, Any] = {"real": plain(RED, GREEN), "base": plain(GREEN)}
    by_colour = score(plain(YELLOW), **options)["fidelity_subject"][0]
    both = score(plain(YELLOW), **options, dino=Blind())["fidelity_subject"][0]
    assert by_colour != 0 and both == pytest.approx(
        by_colour / 2
    )  # to the other judge all images are the same


def test_a_copied_training_image_is_penalised() -> None:
    copy, new = score(plain(BROWN, RED), prompts=["green", "red"])["fidelity_copy"]
    assert copy == pytest.approx(COPY_WEIGHT) and new == 0
    # A preview may be as near to a training image as a held-out image is, and half of the way to a copy.
    near, nearer = (150, 70, 0), (125, 79, 0)
    options: dict[str, Any] = {"real": plain(near), "training": plain(BROWN, BLUE)}
    found = score(plain(near, nearer), **options, base=plain(GREEN, GREEN))["fidelity_copy"]
    assert found[0] == 0 < found[1] < COPY_WEIGHT
    # An untuned model has copied nothing: its image of this prompt is near to a training image by chance.
    chance = score(plain(nearer, nearer), **options, base=plain(GREEN, nearer))["fidelity_copy"]
    assert chance[0] == found[1] and chance[1] == 0
    assert score(plain(BROWN), real=plain(BROWN), training=plain(BROWN))["fidelity_copy"] == [0]


def test_an_ignored_prompt_loses_against_the_untuned_model() -> None:
    scene = (80, 80, 200)  # not the subject, but blue
    before = score(plain(scene, scene), prompts=["blue"] * 2, base=plain(scene, scene))
    after = score(plain(RED, RED), prompts=["blue"] * 2, base=plain(scene, scene))
    assert after["fidelity_subject"][0] > 0.9 and before["fidelity_prompt"] == [0, 0]
    assert after["fidelity_prompt"] == pytest.approx([PROMPT_WEIGHT] * 2)
    assert max(after["fidelity"]) < 0 == pytest.approx(before["fidelity"][0], abs=1e-6)
    mixed = score(plain(RED, RED), prompts=["blue", "red"], base=plain(scene, YELLOW))
    assert mixed["fidelity_prompt"] == pytest.approx([PROMPT_WEIGHT, 0])


def test_a_prompt_may_be_followed_less_than_before_but_not_less_than_half() -> None:
    def lost(*colours: tuple[int, int, int]) -> float:
        options: dict[str, Any] = {"prompts": ["blue"] * 2, "base": plain(BLUE, BLUE)}
        return score(plain(*colours), **options)["fidelity_prompt"][0]

    assert lost((100, 0, 100), BLUE) == 0 < lost((100, 0, 50), (100, 0, 50)) < PROMPT_WEIGHT
    assert lost(RED, BLUE) == 0  # the mean of the images of a prompt counts
    # The real images fit "red" as well as the untuned model's: there is nothing that a preview could ignore.
    assert score(plain(BLUE), real=plain(RED, RED), base=plain(RED))["fidelity_prompt"] == [0]


def test_a_class_that_becomes_the_subject_is_penalised() -> None:
    before = {"real": plain(RED, ORANGE), "base_class_images": plain(YELLOW)}
    whole = score(plain(RED), **before, class_images=plain(RED))["fidelity_class"]
    some = score(plain(RED), **before, class_images=plain((90, 80, 0)))["fidelity_class"]
    assert whole == pytest.approx([CLASS_WEIGHT]) and 0 < some[0] < CLASS_WEIGHT
    away = score(plain(RED), **before, class_images=plain(GREEN))["fidelity_class"]
    assert away == [0] == score(plain(RED))["fidelity_class"]


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
    assert found["fidelity"][0] == pytest.approx(-1 - PROMPT_WEIGHT)
    assert np.isfinite(found["fidelity"]).all() and found["fidelity"][1] > -1
    black = score(plain(RED), clip=Broken(), class_images=plain((0, 0, 0)), base_class_images=plain(YELLOW))
    assert np.isfinite(black["fidelity"]).all()


def test_the_score_is_computed_with_its_parts_if_its_needs_are_given() -> None:
    clip: Any = ColourScorer()
    options: dict[str, Any] = {"prompts": ["red"], "real": plain(RED, ORANGE), "clip": clip}
    assert "fidelity" not in score_images(plain(RED), **options).means
    found = score_images(plain(RED), **options, training=plain(ORANGE, BROWN), base=plain(YELLOW))
    assert found.means.keys() >= {"fidelity", "fidelity_subject", "clip_i"}
    assert found.images[0]["fidelity_subject"] == found.means["fidelity_subject"]
