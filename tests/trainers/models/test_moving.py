"""Test that a model is moved and cast without warnings about parts that need no warning."""

from __future__ import annotations

import diffusers.models.modeling_utils
import pytest
import torch

from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import load_model


def test_a_cast_to_half_precision_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(diffusers.models.modeling_utils.logger, "warning", warned.append)
    model = load_model(ModelConfig(pretrained_model_name_or_path="pocket"), ("denoiser", "vae"))
    model.freeze()
    model.to("cpu", torch.bfloat16)
    assert model.denoiser.dtype == torch.bfloat16
    assert warned == []
