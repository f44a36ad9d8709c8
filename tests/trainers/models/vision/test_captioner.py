"""Test captions and scores by models of transformers, with tiny folders of random weights built here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from image_files import image, put
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.images.sharpness import laplacian_variance
from dreamfleet.trainers.models.vision.captioner import Captioner
from dreamfleet.trainers.models.vision.image_scores import Classifier, Detector

SPECIAL = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[BOS]",
    "[EOS]",
    "<start>",
    "<end>",
    "<vision>",
    "</vision>",
    "<image>",
]
TEXT = "a photo of red cat dog sky user assistant describe this image in one paragraph. please"
WORDS = [*SPECIAL, *TEXT.split()]
COLOURS = ((255, 0, 0), (0, 40, 255), (90, 200, 30))
CHAT = (
    "{% for m in messages %}<start> {{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}"
    "<vision> <image> </vision> {% else %}{{ part.text }} {% endif %}{% endfor %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


def run(*words: Any) -> Any:
    done = CliRunner().invoke(program.app, ["data", *(str(word) for word in words)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def tokenizer(**more: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=SPECIAL[6:], extra_special_tokens=more, **names
    )


def write_blip(folder: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {
        "vocab_size": len(WORDS),
        "bos_token_id": 4,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    config = BlipConfig(
        text_config={**small, **tokens, "encoder_hidden_size": 16, "max_position_embeddings": 64},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer()).save_pretrained(
        folder
    )


def write_florence(folder: Path) -> None:
    from transformers import (
        BartConfig,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = BartConfig(
        vocab_size=len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=4, eos_token_id=5, decoder_start_token_id=14, tie_word_embeddings=False,
    )  # fmt: skip
    vision = {
        "depths": [1], "patch_size": [7], "patch_stride": [4], "patch_padding": [3], "patch_prenorm": [False],
        "embed_dim": [16], "num_heads": [2], "num_groups": [2], "window_size": 4, "projection_dim": 16,
        "max_temporal_embeddings": 4, "max_position_embeddings": 16,
    }  # fmt: skip
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=10, tie_word_embeddings=False
    )
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = 65  # 8 x 8, and their mean
    Florence2Processor(images, tokenizer(image_token="<image>")).save_pretrained(folder)


def write_qwen(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "type": "mrope", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={
            **small, "vocab_size": len(WORDS), "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": rope, "bos_token_id": 4, "eos_token_id": 7,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        image_token_id=10, video_token_id=11, vision_start_token_id=8, vision_end_token_id=9,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    made = tokenizer(image_token="<image>", video_token="<video>")
    made.chat_template = CHAT
    made.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 56**2}).save_pretrained(folder)


FAMILIES = {"blip": write_blip, "florence": write_florence, "qwen": write_qwen}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captioners")
    for name, write in FAMILIES.items():
        torch.manual_seed(3)
        write(root / name)
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_describes_batches_and_follows_its_prompt(models: Path, name: str) -> None:
    images = [
        Image.new("RGB", size, colour)
        for size, colour in zip([(60, 40), (30, 50), (33, 33)], COLOURS, strict=True)
    ]
    model = Captioner(str(models / name), max_tokens=6)
    together = model(images)
    assert together == [model([one])[0] for one in images], "a description does not depend on its batch"
    words = [text.split() for text in together]
    assert all(set(text) <= set(WORDS) and len(text) <= 6 for text in words) and any(words)
    assert not any("user" in text and "assistant" in text for text in words), (
        "the chat is not part of the answer"
    )


def test_a_prompt_changes_the_description(models: Path) -> None:
    picture = [Image.new("RGB", (40, 40), COLOURS[0])]
    for name in ("blip", "qwen"):
        found = {
            Captioner(str(models / name), prompt=text, max_tokens=8)(picture)[0]
            for text in ("", "red sky dog cat")
        }
        assert len(found) == 2, name
    begun = Captioner(str(models / "blip"), prompt="[CLS] red sky dog", max_tokens=3)(picture)[0]
    assert begun.startswith("red sky"), "BLIP's captions begin with the prompt"


def test_folders_without_a_captioner_are_errors(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        Captioner(str(tmp_path))
    put(tmp_path, "config.json", '{"model_type": "bert"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        Captioner(str(tmp_path))


def write_set(folder: Path) -> Path:
    for number, colour in enumerate(COLOURS):
        put(folder, f"{number}.png", b"")
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
    put(folder, "1.txt", "by hand")
    put(folder, "broken.png", b"x")
    return folder


def test_a_table_gets_a_column_for_each_model_and_a_merged_caption(models: Path, tmp_path: Path) -> None:
    folder, table = write_set(tmp_path / "set"), tmp_path / "captions.parquet"
    words = ["caption", folder, "--out", table, "--max-tokens", 4, "--json"]
    first = run(*words, "--model", models / "blip")
    assert list(first["failed"]) == ["broken.png"] and first["skipped"] == 0
    assert list(run(*words, "--model", models / "blip")["captions"]) == []
    again = run(
        *words, "--model", f"q={models / 'qwen'}", "--template", "{caption}, {blip}; {q}", "--block", "dog"
    )
    rows = {Path(row["url"]).name: row for row in pq.read_table(table).to_pylist()}
    assert set(rows["1.png"]) == {"url", "sha256", "blip", "caption", "q"} and len(rows) == 3
    assert again["captions"]["1.png"] == rows["1.png"]["caption"]
    assert rows["1.png"]["caption"].startswith(f"by hand, {rows['1.png']['blip']}".rstrip(", "))
    assert all("dog" not in row["q"].split() for row in rows.values())
    assert sorted(path.name for path in folder.iterdir()) == [
        "0.png",
        "1.png",
        "1.txt",
        "2.png",
        "broken.png",
    ]
    assert not (tmp_path / ".in-progress").exists()


def write_scorers(root: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, YolosConfig, YolosForObjectDetection
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, labels in (("three", ["clean", "Watermark", "text"]), ("aesthetic", ["score"])):
        config = ViTConfig(image_size=32, patch_size=8, id2label=dict(enumerate(labels)), **small)
        ViTForImageClassification(config).save_pretrained(root / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / name)
    config = YolosConfig(
        image_size=[32, 32], patch_size=8, num_detection_tokens=5, id2label={0: "face", 1: "hand"}, **small
    )
    YolosForObjectDetection(config).save_pretrained(root / "yolos")
    YolosImageProcessorPil(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(root / "yolos")


def test_measures_are_columns_of_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_scorers(tmp_path)
    folder, table = write_set(tmp_path / "set"), tmp_path / "facts.parquet"
    put(folder, "noise.png", image(1, size=(32, 32)))
    run("measure", folder, "--out", table, "--json")
    made = run(
        "measure", folder, "--out", table, "--json", "--threshold", 0.01,
        "--classifier", f"mark={tmp_path / 'three'}:watermark", "--classifier", f"aesthetic={tmp_path / 'aesthetic'}",
        "--detector", f"faces={tmp_path / 'yolos'}:face", "--detector", f"all={tmp_path / 'yolos'}",
    )  # fmt: skip
    assert made["new"] == 4 and list(made["failed"]) == ["broken.png"]
    rows = {Path(row["url"]).name: row for row in pq.read_table(table).to_pylist()}
    assert rows["0.png"]["blur"] == 0 and rows["noise.png"]["blur"] > 1000
    assert all(0 < row["mark"] < 1 for row in rows.values()) and all(row["all"] == 5 for row in rows.values())
    assert all(0 <= row["faces"] <= 5 for row in rows.values())
    assert made["columns"]["blur"]["100%"] == pytest.approx(rows["noise.png"]["blur"])
    with pytest.raises(ModelError, match=r"no label 'dog'; it has clean, Watermark, text"):
        Classifier(str(tmp_path / "three"), "dog")
    with pytest.raises(ModelError, match="write"):
        Classifier(str(tmp_path / "three"))
    with pytest.raises(ModelError, match="no label"):
        Detector(str(tmp_path / "yolos"), "cat")


def test_blur_is_the_variance_of_the_laplacian() -> None:
    pixels = np.zeros((5, 5), dtype=np.uint8)
    pixels[2, 2] = 10
    values = np.zeros((3, 3))
    values[1, 1], values[0, 1], values[1, 0], values[1, 2], values[2, 1] = -40, 10, 10, 10, 10
    picture = Image.fromarray(pixels).convert("RGB")
    assert laplacian_variance(picture) == pytest.approx(values.var())
    assert laplacian_variance(Image.new("RGB", (2, 9))) == 0
