"""Test a model's shape from configs or a file header: published sizes, and errors if it cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_configs import SD15, write_configs
from tiny_models import tiny_model

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import load_shape
from dreamfleet.trainers.models.formats.ldm_names import Family
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import context_widths


def sizes(folder: Path) -> dict[str, int]:
    shape = load_shape(ModelConfig(pretrained_model_name_or_path=str(folder)))
    return {name: sum(p.numel() for p in part.parameters()) for name, part in shape.modules().items()}


def test_a_single_file_is_planned_from_its_header(tmp_path: Path) -> None:
    model = tiny_model()
    path = model.save_file(tmp_path / "model.safetensors")
    shape = load_shape(ModelConfig(pretrained_model_name_or_path=str(path)))
    for name, part in model.modules().items():
        known = {key: tensor.shape for key, tensor in part.state_dict().items()}
        assert {k: t.shape for k, t in shape.modules()[name].state_dict().items()} == known, name
    assert all(p.device.type == "meta" for part in shape.modules().values() for p in part.parameters())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="safetensors"):
        load_shape(ModelConfig(pretrained_model_name_or_path=str(path)))


def test_every_variant_has_its_published_size(tmp_path: Path) -> None:
    assert sizes(write_configs(tmp_path / "sd1")) == SD15
    second = sizes(write_configs(tmp_path / "sd2", "sd2"))
    assert second == {**SD15, "unet": 865_910_724, "text_encoder": 340_387_840}
    xl = {**SD15, "unet": 2_567_463_684, "text_encoder_2": 694_659_840}
    assert sizes(write_configs(tmp_path / "sdxl", "sdxl")) == xl
    assert load_shape(ModelConfig()).context_width == 160


@pytest.mark.parametrize(
    ("family", "width", "side"), [("sd1", 768, 512), ("sd2", 1024, 768), ("sdxl", 2048, 1024)]
)
def test_every_variant_has_its_widths_and_resolution(
    tmp_path: Path, family: Family, width: int, side: int
) -> None:
    model = load_shape(ModelConfig(pretrained_model_name_or_path=str(write_configs(tmp_path / "m", family))))
    assert (model.context_width, model.resolution) == (width, side)
    assert max(context_widths(model.unet)) == max(width, 1280) and width in context_widths(model.unet)
    condition = model.empty_condition(3)
    assert condition.context.shape == (3, 77, width)
    assert (condition.pooled is None) == (family != "sdxl") and (
        condition.pooled is None or condition.pooled.shape == (3, 1280)
    )


@pytest.mark.parametrize(
    ("name", "changes", "keyword"),
    [
        ("unclip", {"unet": {"class_embed_type": "projection"}}, "prompt"),
        ("inpaint", {"unet": {"in_channels": 9}}, "9 channels .*4"),
        ("torn", {"unet": {"down_block_types": ["Nonsense"]}}, "unet config"),
    ],
)
def test_models_that_cannot_be_planned_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], keyword: str
) -> None:
    folder = write_configs(tmp_path / name, **changes)
    with pytest.raises(ModelError, match=keyword):
        load_shape(ModelConfig(pretrained_model_name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("name", "keyword"),
    [
        ("someone/never-downloaded", "downloads nothing"),
        ("{tmp}/model.ckpt", "dreamfleet convert"),
        ("{tmp}/absent.safetensors", "does not exist"),
        ("{tmp}", "no unet/config.json"),
    ],
)
def test_models_that_are_not_on_this_machine_are_refused(tmp_path: Path, name: str, keyword: str) -> None:
    with pytest.raises(ModelError, match=keyword):
        load_shape(ModelConfig(pretrained_model_name_or_path=name.format(tmp=tmp_path)))


def test_a_folder_without_a_part_is_refused(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "part")
    (folder / "vae/config.json").unlink()
    with pytest.raises(ModelError, match=r"'vae' .*config"):
        load_shape(ModelConfig(pretrained_model_name_or_path=str(folder)))
    (folder / "vae/config.json").write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        load_shape(ModelConfig(pretrained_model_name_or_path=str(folder)))
