"""Fuzz every file reader: damaged and malicious files raise our errors, quickly and with little memory."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzzing import (
    JSON,
    VALUES,
    apply_damage,
    assert_survives,
    changed,
    damage,
    damaged,
    peak_memory,
    saved,
    torch_files,
)
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save
from tiny_models import tiny_model

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.embedding import Embedding, read_embedding, write_embedding
from dreamfleet.trainers.models.formats.image_embedding import _hide, _to_json, read_image_embedding
from dreamfleet.trainers.models.formats.model_header import tokenizer_in
from dreamfleet.trainers.models.formats.optimizer_file import read_optimizer
from dreamfleet.trainers.models.formats.original_config import schedule_beside
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle
from dreamfleet.trainers.models.formats.single_file import load_single_file_parts
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors
from dreamfleet.trainers.models.pretrained import quiet_libraries
from dreamfleet.trainers.models.stable_diffusion.single_file import load_single_file

WORD = Embedding("fuzz", torch.linspace(-1, 1, 24).reshape(3, 8), 7, "0123456789", "base", {"a": "b"})
WEBUI = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": WORD.vectors},
    "name": "fuzz",
    "step": 7,
    "sd_checkpoint": "0123456789",
    "sd_checkpoint_name": "base",
    "dreamfleet": "{}",
}
PAIR = {"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 12)}
ADAM = {"step": torch.tensor(3.0), "exp_avg": torch.ones(3, 8), "exp_avg_sq": torch.ones(3, 8)}
OPTIM = {"hash": "abcd", "optimizer_state_dict": {"state": {0: ADAM}, "param_groups": [{"params": [0]}]}}


def check_embedding(path: Path) -> None:
    found = read_embedding(path)
    assert found.vectors.dtype == torch.float32 and found.vectors.ndim == 2 and len(found.checksum) == 4
    assert isinstance(found.step, int) and found.name.strip()


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_embedding_pickles(suffix: str, tmp_path: Path) -> None:
    params = changed({"*": WORD.vectors})
    files = (
        changed(WEBUI) | params.map(lambda held: {**WEBUI, "string_to_param": held}) | changed(PAIR) | VALUES
    )
    assert_survives(check_embedding, tmp_path / f"fuzz{suffix}", torch_files(files))
    whole = write_embedding(WORD, tmp_path / f"fuzz{suffix}").read_bytes()
    assert_survives(check_embedding, tmp_path / f"fuzz{suffix}", damaged(whole))


def safetensors_files(header: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for files whose header contradicts `data`: JSON of any shape, impossible numbers."""
    numbers = st.integers(-1, 200) | st.sampled_from([2**31, 2**62, 2**64, 2**70])
    entries = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "X"]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.tuples(numbers, numbers),
        }
    )
    metadata = st.dictionaries(
        st.sampled_from(["dreamfleet.step", "dreamfleet.name", "x"]), st.text(max_size=4) | JSON
    )

    def packed(tree: Any, length: int | None) -> bytes:
        text = json.dumps(tree, default=str).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    trees = st.one_of(
        st.just(header),
        changed(header, entries | JSON),
        metadata.map(lambda text: {**header, "__metadata__": text}),
        JSON,
    )
    return st.builds(packed, trees, st.none() | st.none() | st.sampled_from([0, 7, 2**40, 2**64 - 1]))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("pair", [False, True])
def test_embedding_safetensors(pair: bool, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.safetensors"
    word = Embedding("fuzz", PAIR["clip_l"], vectors_2=PAIR["clip_g"]) if pair else WORD
    whole = write_embedding(word, path).read_bytes()
    for contents in (safetensors_files(*split(whole)), damaged(whole, 300)):
        assert_survives(check_embedding, path, contents)
        path.write_bytes(whole)
        assert_survives(lambda path: read_safetensors(path), path, contents, examples=60)


def carried(payload: bytes, how: str) -> bytes:
    """Return an image file that carries the payload in its text chunk or pixels."""
    image, options = np.full((64, 48, 3), 90, dtype=np.uint8), {}
    if how == "png text":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("sd-ti-embedding", base64.b64encode(payload).decode())
    else:
        image = _hide(image, payload, decoration=np.ones(4, dtype=np.float32))
    stream = io.BytesIO()
    form = "WEBP" if how == "webp pixels" else "PNG"
    Image.fromarray(image).save(stream, form, **options, **({"lossless": True} if form == "WEBP" else {}))
    return stream.getvalue()


@pytest.mark.parametrize("how", ["png text", "png pixels", "webp pixels"])
def test_image_embeddings(how: str, tmp_path: Path) -> None:
    path = tmp_path / ("fuzz.webp" if how == "webp pixels" else "fuzz.png")
    plain = json.loads(_to_json(WEBUI))
    vectors = JSON.map(lambda value: {**plain, "string_to_param": {"*": {"TORCHTENSOR": value}}})
    trees = changed(plain, JSON) | vectors | JSON
    payloads = trees.map(lambda tree: json.dumps(tree).encode()) | damaged(_to_json(WEBUI))
    assert_survives(check_embedding, path, payloads.map(lambda payload: carried(payload, how)))
    assert_survives(check_embedding, path, damaged(carried(_to_json(WEBUI), how)), examples=80)


@pytest.mark.parametrize("suffix", [".avif", ".jxl"])
def test_embeddings_in_imagecodecs_forms(suffix: str, tmp_path: Path) -> None:
    whole = write_embedding(WORD, tmp_path / f"fuzz{suffix}").read_bytes()
    assert_survives(check_embedding, tmp_path / f"fuzz{suffix}", damaged(whole, 40), examples=60)


def test_optimizer_files(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        assert read_optimizer(path, [[3, 8]]).states[0].exp_avg.shape == (3, 8)

    inner = changed(ADAM).map(lambda adam: {"hash": "a", "optimizer_state_dict": {"state": {0: adam}}})
    path = tmp_path / "fuzz.pt.optim"
    assert_survives(read, path, torch_files(changed(OPTIM) | inner | VALUES))
    assert_survives(read, path, damaged(save_pickle(OPTIM, path).read_bytes()))


def test_pickles(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.pt"
    assert_survives(load_pickle, path, damaged(save_pickle({"a": VECTOR, "b": [1, "c"]}, path).read_bytes()))
    assert_survives(load_pickle, path, torch_files(VALUES) | st.binary(max_size=60))


VECTOR = torch.ones(4, 4)


class Asks:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("packing", ["stored", "deflated", "bare"])
def test_a_small_pickle_cannot_allocate_much_memory(packing: str, tmp_path: Path) -> None:
    path, before = tmp_path / "bomb.pt", peak_memory()
    for call in (bytearray, torch.FloatTensor, torch.UntypedStorage):
        content = pickle.dumps({"string_to_param": {"*": Asks(call, 2**33)}}, protocol=2)
        if packing == "bare":
            path.write_bytes(content)
        else:
            kind = zipfile.ZIP_DEFLATED if packing == "deflated" else zipfile.ZIP_STORED
            with zipfile.ZipFile(path, "w", kind) as archive:
                archive.writestr("a/data.pkl", content)
                archive.writestr("a/data/0", b"\0" * 64)
                archive.writestr("a/version", "3\n")
        with pytest.raises(FormatError, match=r"bomb\.pt"):
            read_embedding(path)
    assert peak_memory() - before < 2**28


def test_expanded_views_are_not_copied(tmp_path: Path) -> None:
    stretched, before = torch.zeros(1, dtype=torch.bfloat16).expand(2**16, 2**16), peak_memory()
    for data in ({"word": stretched}, {**WEBUI, "string_to_param": {"*": stretched}}):
        torch.save(data, tmp_path / "bomb.pt")
        with pytest.raises(FormatError, match=r"bomb\.pt: .*claim \d+ bytes"):
            read_embedding(tmp_path / "bomb.pt")
    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": stretched}}, tmp_path / "bomb.ckpt")
    with pytest.raises(FormatError, match=r"bomb\.ckpt: .*claim"):
        load_single_file(tmp_path / "bomb.ckpt")
    assert peak_memory() - before < 2**28


CONFIG_VALUES = JSON | st.sampled_from(
    [0, -1, 10**9, 10**30, float("inf"), [10**9], [1] * 70, "swish", [[1, 2], [3]]]
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet_libraries()
    return tiny_model().save_file(tmp_path_factory.mktemp("model") / "whole.safetensors")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_single_files_with_other_configs(part: str, model_file: Path, tmp_path: Path) -> None:
    header = split(model_file.read_bytes())[0]["__metadata__"]
    state, name = load_file(model_file), f"dreamfleet.{part}_config"
    configs = (
        changed(json.loads(header[name]), CONFIG_VALUES).map(json.dumps) | JSON.map(json.dumps) | st.text()
    )
    needs = ["vae"] if part == "scheduler" else [part]

    def made(config: str) -> bytes:
        return save(state, metadata={**header, name: config.encode("utf-8", "replace").decode()})

    def read(path: Path) -> None:
        assert needs[0] in load_single_file(path, needs=needs).modules()

    assert_survives(read, tmp_path / "fuzz.safetensors", configs, make=made, examples=40)


def test_tokenizers_in_a_header(model_file: Path, tmp_path: Path) -> None:
    header = split(model_file.read_bytes())[0]["__metadata__"]
    files = json.loads(header["dreamfleet.tokenizer"])
    texts = st.text(max_size=20) | JSON.map(json.dumps)
    names = st.sampled_from([*files, "../../evil", "vocab.json", "merges.txt", "", "a\0b", "/etc/x"])
    others = st.dictionaries(names, texts, max_size=2).map(lambda changes: json.dumps(files | changes))

    def read(path: Path) -> None:
        whole = path.read_text("utf-8")
        assert tokenizer_in({"dreamfleet.tokenizer": whole or " "}, path, "sd1").model_max_length

    written = tmp_path / "fuzz.json"
    assert_survives(
        read, written, others | texts, make=lambda text: text.encode("utf-8", "replace"), examples=40
    )
    assert not (tmp_path.parent / "evil").exists()


def test_single_files_with_other_tensors(model_file: Path, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        assert load_single_file_parts(path, needs=["vae"]).states["vae"]

    whole = model_file.read_bytes()
    assert_survives(
        read,
        tmp_path / "fuzz.safetensors",
        damage(whole, 12_000),
        make=lambda done: apply_damage(whole, done),
        examples=40,
    )
    state = {key: t for key, t in load_file(model_file).items() if key.startswith("first_stage")}
    data = {"state_dict": state, "dreamfleet": split(whole)[0]["__metadata__"]}
    some = list(state)[:5]

    def made(changes: tuple[dict[Any, Any], dict[Any, Any]]) -> bytes:
        return saved({**data, **changes[0], "state_dict": {**state, **changes[1]}})

    others = st.dictionaries(st.sampled_from(["dreamfleet", "other"]), VALUES, max_size=2)
    tensors = st.dictionaries(st.sampled_from(some) | st.text(max_size=3), VALUES, max_size=2)
    assert_survives(read, tmp_path / "fuzz.ckpt", st.tuples(others, tensors), make=made, examples=40)


def test_the_yaml_beside_a_file(tmp_path: Path) -> None:
    valid: dict[str, Any] = {
        "parameterization": "v",
        "linear_start": 0.00085,
        "denoiser_config": {"params": {}},
    }
    trees = changed(valid, JSON).map(lambda params: {"model": {"params": params}}) | JSON
    texts = trees.map(lambda tree: yaml.safe_dump(tree).encode()) | st.text(max_size=40).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
    bombs = st.sampled_from(
        [b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (i, i) for i in range(50)), b"{" * 9999]
    )

    def read(path: Path) -> None:
        assert set(schedule_beside(path)) <= {
            "prediction_type",
            "beta_start",
            "beta_end",
            "rescale_betas_zero_snr",
        }

    assert_survives(
        read, tmp_path / "fuzz.yaml", texts | bombs | damaged(b"model: {params: {parameterization: v}}\n")
    )


def test_images_of_any_bytes(tmp_path: Path) -> None:
    heads = st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBPVP8L", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"]
    )
    contents = st.builds(lambda head, rest: head + rest, heads, st.binary(max_size=80))
    assert_survives(
        lambda path: read_image_embedding(path),
        tmp_path / "fuzz.png",
        contents,
        examples=80,
        some_are_read=False,
    )
