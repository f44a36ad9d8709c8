"""Every registered artifact kind: detected, read back, converted both ways, described; unknown files name the kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact_contract import check_kind
from tiny_models import WIDTH, tiny_model

from dreamfleet.datasets.errors import FormatError, UserError
from dreamfleet.trainers.artifacts.conversion import convert_artifact
from dreamfleet.trainers.artifacts.kind import ARTIFACTS, detect_kind
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.config.hypernetwork_structure import Structure
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.models.formats.aesthetic import write_aesthetic
from dreamfleet.trainers.models.formats.embedding import Embedding, write_embedding
from dreamfleet.trainers.models.formats.hypernetwork import write_hypernetwork
from dreamfleet.trainers.models.formats.lora import LoraFile, Matrices, write_kohya_lora
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Hypernetwork
from dreamfleet.trainers.models.vision.discriminator import make_network, save_network


def make_embedding(folder: Path) -> Path:
    return write_embedding(Embedding("cat", torch.randn(2, WIDTH)), folder / "cat.pt")


def make_hypernetwork(folder: Path) -> Path:
    return write_hypernetwork(Hypernetwork([WIDTH], Structure()).to_file("cat"), folder / "cat.pt")


def make_aesthetic(folder: Path) -> Path:
    return write_aesthetic(torch.randn(1, 24), folder / "cat.pt")


def make_lora(folder: Path) -> Path:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    matrices = Matrices(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), 2.0)
    return write_kohya_lora(LoraFile("cat", {layer: matrices}), folder / "cat.safetensors")


def make_checkpoint(folder: Path) -> Path:
    tiny_model().save_folder(folder / "diffusers")
    return folder / "diffusers"


def make_classifier(folder: Path) -> Path:
    network = make_network(depths=(1, 1), hidden_sizes=(4, 8), classes=("other", "good"), drop_path=0)
    save_network(network, folder / "cat", size=32, dtype=torch.float32, metadata={})
    return folder / "cat"


# How to make an artifact of each kind, the name that it is converted to, and a method that exports the kind.
CASES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "embedding": (make_embedding, "dog.png", "textual_inversion"),
    "hypernetwork": (make_hypernetwork, "dog.pt", "hypernetwork"),
    "aesthetic": (make_aesthetic, "dog.pt", "aesthetic_gradients"),
    "lora": (make_lora, "dog.safetensors", "dreambooth"),
    "checkpoint": (make_checkpoint, "dog.safetensors", "native"),
    "classifier": (make_classifier, "dog.pth", "discriminator"),
}


@pytest.mark.parametrize("name", ARTIFACTS.names())
def test_a_kind_is_detected_converted_and_described(name: str, tmp_path: Path) -> None:
    assert name in CASES, f"add a file of the kind {name} to CASES"
    make, target, method = CASES[name]
    check_kind(ARTIFACTS.get(name)(), make(tmp_path), tmp_path / target, method=method)


def test_every_method_exports_registered_kinds() -> None:
    for _, section in METHODS.items():
        assert section.artifacts and set(section.artifacts) <= set(ARTIFACTS.names())


@pytest.mark.parametrize("name", ["notes.txt", "weights.pt", "weights.safetensors", "folder"])
def test_an_unknown_kind_is_an_error_that_names_the_known_ones(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2), "b": torch.ones(3)}, path)
    else:
        torch.save({"a": torch.ones(2), "b": torch.ones(3)}, path)
    known = ", ".join(ARTIFACTS.names())
    with pytest.raises(FormatError, match=known) as raised:
        detect_kind(path)
    assert str(path) in str(raised.value)
    if name.startswith("weights"):  # why it is no embedding, which its name could be
        assert "2 entries" in str(raised.value)
    with pytest.raises(FormatError, match=known):
        convert_artifact(path, tmp_path / "out.safetensors")


def test_a_file_that_a_method_does_not_export_is_not_described_as_a_checkpoint() -> None:
    for method, name in (("hypernetwork", "cat.ckpt"), ("dreambooth", "cat.xyz"), ("unknown", "cat.ckpt")):
        with pytest.raises(UserError, match=", ".join(ARTIFACTS.names())):
            describe(name, run_name="cat", recipe={"method": {"name": method}})


def test_a_target_without_a_format_is_an_error(tmp_path: Path) -> None:
    for make, target in ((make_lora, "dog.png"), (make_checkpoint, "dog.png"), (make_classifier, "dog.bin")):
        with pytest.raises(UserError, match=target):
            convert_artifact(make(tmp_path), tmp_path / target)
        assert not (tmp_path / target).exists()
