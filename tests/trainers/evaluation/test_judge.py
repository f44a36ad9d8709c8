"""Scores of images by every metric whose needs are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from colour_scorer import GREEN, HALF, RED, YELLOW, ColourScorer, plain
from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.evaluation import judge
from dreamfleet.trainers.evaluation.judge import References, score_images


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


def test_clip_is_loaded_only_if_a_metric_needs_it_and_computes_features_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CountingScorer(ColourScorer):
        calls: ClassVar[list[int]] = []

        def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
            self.calls.append(len(images))
            return super().image_features(images)

    loaded: list[str | None] = []

    def load_clip(name: str | None) -> ColourScorer:
        loaded.append(name)
        return CountingScorer()

    monkeypatch.setattr(judge, "load_clip", load_clip)
    previews: dict[str, Any] = {"prompts": ["red"], "metrics": ["loss"]}
    judge.Judge(ValidationConfig.model_validate(previews), references=References(real=plain(RED)), strip={})
    assert loaded == []
    previews |= {"metrics": ["clip_t", "clip_i"], "clip": "mine"}
    references = References(real=plain(RED, GREEN, RED))
    scorer = judge.Judge(ValidationConfig.model_validate(previews), references=references, strip={})
    cells: list[dict[str, Any]] = [{"prompt": "red"}, {"prompt": "green"}]
    assert scorer.score(plain(RED, YELLOW), cells).keys() == {"clip_i", "clip_t"}
    assert loaded == ["mine"] and sorted(CountingScorer.calls) == [2, 3]
    assert [cell["scores"]["clip_t"] for cell in cells] == [1, round(HALF, 4)]
