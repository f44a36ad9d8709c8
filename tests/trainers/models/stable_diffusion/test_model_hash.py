"""Test the hash and name by which the webui identifies base models, in artifacts and in PNG metadata."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tiny_model
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.trainers.config.methods.hypernetwork import HypernetworkConfig
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.methods.base import Setting
from dreamfleet.trainers.methods.embedding_common import export_word
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.hypernetwork import HypernetworkMethod
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.models.formats.embedding import read_embedding
from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork
from dreamfleet.trainers.models.stable_diffusion.fingerprints import short_hash


def load(path: Path) -> DiffusionModel:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(path)))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


@pytest.fixture(scope="module", params=[".safetensors", ".ckpt"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model().save_file(tmp_path_factory.mktemp("models") / f"cat.v1.5{request.param}")


def test_artifacts_name_the_base_model_as_the_webui_does(file: Path, tmp_path: Path) -> None:
    model = load(file)
    order = Export(tmp_path, "look", formats=("pt", "safetensors", "png"))
    for path in export_word([torch.ones(2, 32)], order, word="look", model=model):
        found = read_embedding(path)
        assert (found.sd_checkpoint, found.sd_checkpoint_name) == (sha(file), "cat.v1.5"), path
    config = HypernetworkConfig(name="hypernetwork")
    [path] = HypernetworkMethod(config, model, Setting()).export(Export(tmp_path, "ink"))
    network = read_hypernetwork(path)
    assert (network.sd_checkpoint, network.sd_checkpoint_name) == (sha(file), "cat.v1.5")


def test_image_metadata_has_the_hash_of_the_file(file: Path, tmp_path: Path) -> None:
    arguments = ["sample", "--model", str(file), "--prompt", "a cat", "--steps", "1", "--num-images", "1"]
    result = CliRunner().invoke(program.app, [*arguments, "--out", str(tmp_path / "grid.png")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "grid.png") as image:
        assert f"Model hash: {sha(file)}, Model: cat.v1.5" in image.info["parameters"]


def test_the_hash_of_a_folder_is_that_of_its_unet_and_its_name_keeps_dots(tmp_path: Path) -> None:
    folder = tmp_path / "sd-v1.5"
    tiny_model().save_folder(folder)
    model = load(folder)
    assert (model.short_hash(), model.short_name) == (
        sha(folder / "unet/diffusion_pytorch_model.safetensors"),
        "sd-v1.5",
    )
    shutil.rmtree(folder)
    assert model.short_hash() is None  # the folder was moved during the run


def test_a_changed_file_has_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"one")
    first = short_hash(path)
    path.write_bytes(b"three")
    assert (first, short_hash(path)) == (
        hashlib.sha256(b"one").hexdigest()[:10],
        hashlib.sha256(b"three").hexdigest()[:10],
    )
