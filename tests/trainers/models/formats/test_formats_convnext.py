"""Test ConvNeXt classifier files: round trips, the authors' and timm's names, outputs, malicious files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from webui_safety import assert_webui_safe

from dreamfleet.datasets.errors import FormatError, ModelError
from dreamfleet.trainers.models.formats.convnext import read_convnext, write_convnext
from dreamfleet.trainers.models.vision.discriminator import (
    load_discriminator,
    make_network,
    make_preprocessing,
    save_network,
)

DEPTHS, WIDTHS = [1, 2], [4, 8]


@pytest.fixture(scope="module")
def network() -> Any:
    """Return a tiny classifier of three classes with random weights, in evaluation mode."""
    torch.manual_seed(0)
    made = make_network(depths=DEPTHS, hidden_sizes=WIDTHS, classes=["a", "b", "c"], drop_path=0.0)
    for param in made.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return made.eval()


def by_authors(network: Any, folder: Path) -> dict[str, Tensor]:
    return torch.load(write_convnext(network.state_dict(), folder / "w.pth"), weights_only=True)


def to_timm(name: str) -> str:
    for pattern, other in (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
        (r"dwconv", "conv_dw"),
        (r"pwconv", "mlp.fc"),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    ):
        name = re.sub(pattern, other, name)
    return name


def run_by_hand(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Compute the network of Liu et al. 2022, figure 4, from weights under the authors' names.

    ``pixels`` has shape (batch, 3, height, width); the returned logits have shape (batch, classes).
    """

    def norm(x: Tensor, name: str) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
        return x.permute(0, 3, 1, 2)

    x = pixels
    for stage, depth in enumerate(DEPTHS):
        down = f"downsample_layers.{stage}"
        conv, size = (f"{down}.0", 4) if stage == 0 else (f"{down}.1", 2)
        x = norm(x, f"{down}.0") if stage else x
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], stride=size)
        x = x if stage else norm(x, f"{down}.1")
        for block in range(depth):
            name, kept = f"stages.{stage}.{block}", x
            depthwise = state[f"{name}.dwconv.weight"]
            x = F.conv2d(x, depthwise, state[f"{name}.dwconv.bias"], padding=3, groups=len(depthwise))
            x = norm(x, f"{name}.norm").permute(0, 2, 3, 1)
            x = F.gelu(F.linear(x, state[f"{name}.pwconv1.weight"], state[f"{name}.pwconv1.bias"]))
            x = F.linear(x, state[f"{name}.pwconv2.weight"], state[f"{name}.pwconv2.bias"])
            x = kept + (x * state[f"{name}.gamma"]).permute(0, 3, 1, 2)
    pooled = F.layer_norm(x.mean((2, 3)), [WIDTHS[-1]], state["norm.weight"], state["norm.bias"], 1e-6)
    return F.linear(pooled, state["head.weight"], state["head.bias"])


def test_a_file_has_the_tensor_names_of_the_authors_and_round_trips(network: Any, tmp_path: Path) -> None:
    path = write_convnext(network.state_dict(), tmp_path / "a.pth")
    assert_webui_safe(path)
    found = read_convnext(path)
    assert found.config["depths"] == DEPTHS and found.config["hidden_sizes"] == WIDTHS
    assert found.state.keys() == network.state_dict().keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in network.state_dict().items())


def test_the_output_equals_that_of_the_network_in_the_paper(network: Any, tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    by_hand = run_by_hand(by_authors(network, tmp_path), pixels)
    loaded = load_discriminator(str(tmp_path / "w.pth")).network
    assert torch.allclose(loaded(pixel_values=pixels).logits, by_hand, atol=1e-5) and by_hand.std() > 1e-3


@pytest.mark.parametrize("form", ["model", "parallel", "timm", "timm.safetensors", "ours", "half"])
def test_published_forms_are_read(network: Any, form: str, tmp_path: Path) -> None:
    plain, path = by_authors(network, tmp_path), tmp_path / "found.pth"
    if form == "model":  # as saved by the authors' main.py
        torch.save({"model": plain, "epoch": 3, "args": argparse.Namespace(lr=2e-4), "scaler": {}}, path)
    elif form == "parallel":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in plain.items()}}, path)
    elif form == "timm":
        torch.save({to_timm(name): tensor for name, tensor in plain.items()}, path)
    elif form == "timm.safetensors":
        path = tmp_path / "model.safetensors"
        save_file({to_timm(name): tensor for name, tensor in plain.items()}, path)
    elif form == "ours":
        torch.save(network.state_dict(), path)
    else:
        torch.save({name: tensor.half() for name, tensor in plain.items()}, path)
    state = load_discriminator(str(path)).network.state_dict()
    tolerance = 1e-3 if form == "half" else 0
    for name, tensor in network.state_dict().items():
        assert torch.allclose(state[name], tensor, rtol=0, atol=tolerance), name


def test_a_folder_loads_in_transformers(network: Any, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    save_network(network, tmp_path / "judge", size=32, dtype=torch.float32, metadata={"k": "v"})
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "judge")
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 70, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "judge")(image, return_tensors="pt").pixel_values
    # transformers resizes with torchvision, so pixels differ slightly.
    assert torch.allclose(pixels, make_preprocessing(32)([image]), atol=0.03)
    assert torch.equal(theirs(pixels).logits, network(pixels).logits)
    loaded = load_discriminator(str(tmp_path / "judge"))
    assert loaded.preprocessing == make_preprocessing(32) and loaded.num_classes == 3
    (tmp_path / "judge" / "preprocessor_config.json").write_text('{"size": []}')
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        load_discriminator(str(tmp_path / "judge"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "classifier.weight is missing"),
        ({"stages.1.1.norm.bias": None}, "layernorm.bias is missing"),
        ({"stages.1.0.dwconv.weight": None}, "ConvNeXt"),
        ({"stages.1.1.grn.gamma": torch.ones(1)}, "no weight"),
        ({"stages.0.900000000.gamma": torch.ones(4)}, "unexpected"),
        ({"head.bias": torch.ones(4)}, r"shape \[4\], not \[3\]"),
        ({"head.bias": torch.full((3,), float("nan"))}, "NaN"),
        ({"head.bias": torch.ones(3, dtype=torch.int64)}, "floating"),
        ({"head.bias": torch.ones(1).expand(2**40)}, "larger"),
        ({"head.bias": "text"}, "no classifier"),
        ({"stem.0.bias": torch.ones(4)}, "patch_embeddings.bias .*twice"),
    ],
)
def test_other_content_is_rejected(
    network: Any, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = {**by_authors(network, tmp_path), **change}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "bad.pth")
    with pytest.raises(FormatError, match=message):
        read_convnext(tmp_path / "bad.pth")


def can_read(content: bytes, path: Path) -> bool:
    """Return whether a file is read as a classifier; an error other than FormatError fails the test."""
    path.write_bytes(content)
    try:
        found = read_convnext(path)
    except FormatError:
        return False
    assert all(torch.isfinite(tensor).all() for tensor in found.state.values())
    return True


FUZZ = settings(max_examples=120, deadline=4000, derandomize=True)


def test_damaged_files_raise_format_errors(network: Any, tmp_path: Path) -> None:
    whole, outcomes = write_convnext(network.state_dict(), tmp_path / "a.pth").read_bytes(), []

    @FUZZ
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=9)), max_size=3),
        st.integers(0, len(whole)),
        st.booleans(),
    )
    def read(changes: list[tuple[int, bytes]], end: int, cut: bool) -> None:
        content = bytearray(whole)
        for place, patch in changes:
            content[place : place + len(patch)] = patch
        outcomes.append(can_read(bytes(content[:end] if cut else content), tmp_path / "fuzz.pth"))

    read()
    assert any(outcomes) and not all(outcomes)


def test_fuzzed_weights_raise_format_errors(network: Any, tmp_path: Path) -> None:
    plain = by_authors(network, tmp_path)
    shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=4)
    tensors = st.builds(lambda sizes: torch.ones(sizes), shapes) | st.none() | st.integers(0, 3)
    outcomes = []

    @FUZZ
    @given(st.dictionaries(st.sampled_from([*plain, "stages.2.0.dwconv.weight", "x"]), tensors, max_size=2))
    def read(changes: dict[str, Any]) -> None:
        torch.save({**plain, **changes}, tmp_path / "whole.pth")
        outcomes.append(can_read((tmp_path / "whole.pth").read_bytes(), tmp_path / "fuzz.pth"))

    read()
    assert any(outcomes) and not all(outcomes)
