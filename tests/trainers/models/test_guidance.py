"""Test guidance in training: parsing, values against DreamArtist's formulas, and the guided prediction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WIDTH, tiny_model

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.guidance import Guidance, parse_guidance
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.guidance import guidance_at, guide, pair_inputs

SCALES = st.floats(0, 1000).map(lambda value: round(value, 4))
CURVES = {
    "ln": lambda rate: rate,
    "cos": lambda rate: math.cos((rate - 1) * math.pi / 2),
    "cos2": lambda rate: 1 - math.cos(rate * math.pi / 2),
}


@given(low=SCALES, high=SCALES, curve=st.sampled_from(sorted(CURVES)), space=st.sampled_from(["", " ", "  "]))
def test_a_schedule_is_parsed_as_written(low: float, high: float, curve: str, space: str) -> None:
    text = f"{space}{low:.4f}{space}-{space}{high:.4f}{space}:{space}{curve}{space}"
    if low or high:
        assert parse_guidance(text) == (low, high, curve)
        assert parse_guidance(f"{low:.4f}-{high:.4f}") == (low, high, "ln")
    else:
        with pytest.raises(RecipeError, match="not trained"):
            parse_guidance(text)


@given(value=SCALES.filter(bool))
def test_a_fixed_scale_is_the_same_at_every_timestep(value: float) -> None:
    for written in (f"{value:.4f}", float(f"{value:.4f}")):
        if "e" not in str(written):
            found = guidance_at(parse_guidance(written), torch.tensor([0.0, 0.017, 1.0]))
            assert torch.allclose(found, torch.full((3,), value))


@given(text=st.text(alphabet="0123456789.-:,e+ lncos2()_infa", max_size=12) | st.text(max_size=12))
def test_any_text_is_a_schedule_or_a_clear_error(text: str) -> None:
    try:
        found = parse_guidance(text)
    except RecipeError as error:
        found, message = None, str(error)
    if found is None:
        assert repr(text) in message
    else:
        assert all(math.isfinite(value) and value >= 0 for value in found[:2]) and found.curve in CURVES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "three",
        "-3",
        "1.5,3.0",
        "3:cos",
        "1-2-3",
        "1-3:",
        "1-3:sin",
        "1-3:rate**2",
        "1-3:__import__('os')",
        "nan",
        "1e400",
        "٣",
    ],
)
def test_invalid_schedules_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="number"):
        parse_guidance(text)


@pytest.mark.parametrize("curve", sorted(CURVES))
def test_the_scale_of_each_sample_follows_its_timestep(curve: Any) -> None:
    timesteps = torch.tensor([0, 250, 500, 999])
    found = guidance_at(Guidance(1.5, 4.0, curve), tiny_model().noise_level(timesteps))
    expected = [1.5 + 2.5 * CURVES[curve](t / 999) for t in timesteps.tolist()]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("scales", [[3.0, 3.0, 3.0], [1.0, 2.0, 5.0], [1.0, 1.0, 1.0]])
def test_each_sample_has_its_own_guided_prediction(scales: list[float]) -> None:
    # DreamArtist fails for batches with a dynamic scale, and for a scale of 1.
    model = tiny_model()
    unet: Any = model.unet
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    contexts = torch.randn(3, 2, 77, WIDTH, generator=generator, requires_grad=True)
    timesteps = torch.tensor([1, 400, 900])
    predicted = model.predict(*pair_inputs(noisy, timesteps, Condition(contexts)))
    found = guide(predicted, torch.tensor(scales))
    for row, scale in enumerate(scales):
        one, t = noisy[row : row + 1], timesteps[row : row + 1]
        negative, positive = (unet(one, t, contexts[row, side][None]).sample for side in (0, 1))
        expected = negative + scale * (positive - negative)
        assert torch.allclose(found[row], expected[0], atol=1e-4)
    (gradient,) = torch.autograd.grad(found.square().sum(), contexts)
    moved = gradient.flatten(2).abs().sum(2) > 1e-4
    # With a scale of 1, the negative prompt cancels out.
    assert moved[:, 1].all() and moved[:, 0].tolist() == [scale != 1 for scale in scales]
