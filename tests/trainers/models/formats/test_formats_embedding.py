"""Test embedding files: all round trips, the webui's values, malicious files, diffusers' loader."""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from webui_safety import assert_webui_safe

from dreamfleet.datasets.errors import FormatError, StorageError
from dreamfleet.trainers.models.formats import image_embedding, lossless_image
from dreamfleet.trainers.models.formats.embedding import Embedding, read_embedding, write_embedding
from dreamfleet.trainers.models.formats.image_embedding import lcg_noise, read_image_embedding
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle


def embedding(vectors: int = 3, width: int = 32, name: str = "my-cat") -> Embedding:
    values = torch.randn(vectors, width, generator=torch.Generator().manual_seed(vectors)) * 0.02
    return Embedding(name, values, 200, "0123456789", "pocket", {"steps": "200", "recipe": "a: [1]\nb: ü"})


def assert_equal(read: Embedding, written: Embedding, *, whole: bool = True) -> None:
    assert torch.equal(read.vectors, written.vectors)
    assert read.vectors.dtype == torch.float32
    assert read.name == written.name
    if whole:
        assert (read.step, read.sd_checkpoint, read.sd_checkpoint_name, read.metadata) == (
            written.step,
            written.sd_checkpoint,
            written.sd_checkpoint_name,
            written.metadata,
        )


def test_values_equal_those_of_the_webui() -> None:
    assert Embedding("a", torch.arange(8.0)[None] / 10).checksum == "2200"
    assert Embedding("a", torch.tensor([[-0.5, -1.23]])).checksum == f"{_const_hash([-50, -123]):04x}"
    assert lcg_noise(8).tolist() == [253, 242, 127, 44, 157, 27, 239, 133]
    state, expected = 0, []
    for _ in range(1000):
        state = (1664525 * state + 1013904223) % 2**32
        expected.append(state % 255)
    assert lcg_noise(1000).tolist() == expected


def _const_hash(values: list[int]) -> int:
    result = 0
    for value in values:
        result = ((result * 281) ^ (value * 997)) % 2**32
    return result % 2**16


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ".png", ".webp", ".avif", ".jxl"])
@pytest.mark.parametrize("vectors", [1, 5])
def test_every_format_round_trips(suffix: str, vectors: int, tmp_path: Path) -> None:
    written = embedding(vectors)
    path = write_embedding(written, tmp_path / f"my-cat{suffix}")
    assert_equal(read_embedding(path), written, whole=suffix != ".bin")
    assert read_embedding(path, name="other").name == "other"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("height", [64, 96, 600])
def test_the_pixels_alone_carry_the_embedding(height: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(height)
    image = Image.fromarray(rng.integers(0, 256, (height, height // 2, 3), dtype=np.uint8))
    written = embedding(4, 768)
    path = write_embedding(written, tmp_path / "a.png", image=image)
    with Image.open(path) as image:
        assert read_image_embedding(path)["string_to_param"]["*"].equal(written.vectors)
        bare = Image.fromarray(np.asarray(image))
    framed = Image.new("RGB", (bare.width + 20, bare.height + 12))
    framed.paste(bare, (7, 5))
    for shown in (bare, framed):
        shown.save(tmp_path / "bare.png")
        assert_equal(read_embedding(tmp_path / "bare.png"), written)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".avif", ".jxl"])
def test_a_lossy_image_is_explained_under_any_name(suffix: str, tmp_path: Path) -> None:
    good = write_embedding(embedding(), tmp_path / "good.png")
    with Image.open(good) as image:
        for form, options in (
            ("JPEG", {"quality": 95}),
            ("WEBP", {"quality": 90}),
            ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        ):
            image.convert("RGB").save(tmp_path / f"my-cat{suffix}", form, **options)
            with pytest.raises(FormatError, match=r"no embedding.*loss"):
                read_embedding(tmp_path / f"my-cat{suffix}")


def test_missing_image_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless_image, "encode", lambda pixels, *_: _lossy_avif(pixels))
    with pytest.raises(FormatError, match=r"my-cat\.avif: .*not lossless.*\.png or \.webp"):
        write_embedding(embedding(), tmp_path / "my-cat.avif")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for suffix in (".avif", ".jxl"):
        with pytest.raises(FormatError, match=r"pip install 'dreamfleet\[formats\]'"):
            write_embedding(embedding(), tmp_path / f"my-cat{suffix}")
    with pytest.raises(FormatError, match=r"train\.export_formats: jxl: .*pip install"):
        lossless_image.require_codecs(["pt", "jxl"])
    lossless_image.require_codecs(["pt", "png"])
    (tmp_path / "x.jxl").write_bytes(b"\xff\x0a" + bytes(40))
    with pytest.raises(FormatError, match=r"pip install 'dreamfleet\[formats\]'"):
        read_embedding(tmp_path / "x.jxl")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jxl"]


def _lossy_avif(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "AVIF", quality=100, subsampling="4:4:4")
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".avif", ".jxl"])
@pytest.mark.parametrize("shape", [(1, 1), (77, 33), (256, 512)])
def test_image_formats_are_lossless(suffix: str, shape: tuple[int, int]) -> None:
    """Test round trips of pixels; the 256 x 512 image contains every value of each channel.

    Pillow reads AVIF, as in the webui.
    """
    pixels = np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels[:256, :256] = np.stack(np.broadcast_arrays(*np.ogrid[:256, :256], 128), axis=-1)[
        : shape[0], : shape[1]
    ]
    written = lossless_image.encode(pixels, suffix, "here")
    if suffix == ".jxl":
        read = lossless_image.decode_jxl(written, shape[::-1], "here")
    else:
        read = Image.open(io.BytesIO(written))
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), pixels)


def test_a_photograph_is_equal_in_every_format(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    shown = []
    for suffix in (".png", ".webp", ".avif"):
        path = write_embedding(embedding(4, 768), tmp_path / f"my-cat{suffix}", image=image)
        with Image.open(path) as opened:
            shown.append(np.asarray(opened.convert("RGB")))
    content = write_embedding(embedding(4, 768), tmp_path / "my-cat.jxl", image=image).read_bytes()
    size = lossless_image.size_of(content)
    assert size is not None
    shown.append(np.asarray(lossless_image.decode_jxl(content, size, "here")))
    assert all(np.array_equal(one, shown[0]) for one in shown)


@pytest.mark.parametrize("size", [(40, 24), (256, 256), (300, 200), (517, 33), (1920, 1080), (9000, 40)])
def test_the_size_of_a_jpeg_xl_is_read_before_decoding(size: tuple[int, int]) -> None:
    for container in (False, True):
        content = _jxl(np.full((*size[::-1], 3), 99, dtype=np.uint8), usecontainer=container)
        assert lossless_image.is_jxl(content)
        assert lossless_image.size_of(content) == size
    assert lossless_image.size_of(b"\xff\x0a") is None


def test_a_huge_jpeg_xl_is_rejected_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content = _jxl(np.zeros((3000, 3000, 3), dtype=np.uint8))
    monkeypatch.setattr(image_embedding, "MAX_PIXELS", 2999 * 3000)
    monkeypatch.setattr(lossless_image, "decode_jxl", None)
    with pytest.raises(FormatError, match="3000x3000"):
        read_image_embedding(content)


def test_only_8_bit_colour_jpeg_xl_is_read(tmp_path: Path) -> None:
    with Image.open(write_embedding(embedding(), tmp_path / "my-cat.png")) as image:
        pixels = np.asarray(image.convert("RGBA"))
    (tmp_path / "my-cat.jxl").write_bytes(_jxl(pixels))
    assert_equal(read_embedding(tmp_path / "my-cat.jxl"), embedding())
    for other in (pixels[..., 0].copy(), pixels.astype(np.uint16), (pixels / 255).astype(np.float32)):
        with pytest.raises(FormatError, match="8 bits"):
            read_image_embedding(_jxl(other))


def _jxl(pixels: Any, **options: Any) -> bytes:
    return bytes(
        importlib.import_module("imagecodecs").jpegxl_encode(pixels, lossless=True, effort=1, **options)
    )


def test_the_pixel_block_has_the_webui_layout(tmp_path: Path) -> None:
    """Test the layout with an independent decoder of the webui's format."""
    written = embedding(2, 768)
    path = write_embedding(written, tmp_path / "my-cat.png")
    pixels = np.asarray(Image.open(path).convert("RGB")) & 0x0F
    walls = [x for x in range(pixels.shape[1]) if not pixels[:, x].any()]
    low, high = pixels[:, : walls[0]].reshape(-1), pixels[:, walls[-1] + 1 :].reshape(-1)
    hidden, state = bytearray(), 0
    for one, two in zip(low, high, strict=True):
        state = (1664525 * state + 1013904223) % 2**32
        mask = state % 255 & 0x0F
        hidden.append((int(two) ^ mask) << 4 | int(one) ^ mask)
    inflater = zlib.decompressobj()
    data = json.loads(inflater.decompress(bytes(hidden)))
    n, height = len(hidden) - len(inflater.unused_data), pixels.shape[0]
    n += height - n % height
    assert len(hidden) == n + (3 * height - n % (3 * height))
    assert data["string_to_token"] == {"*": 265}
    assert torch.tensor(data["string_to_param"]["*"]["TORCHTENSOR"]).equal(written.vectors)
    text = Image.open(path).text["sd-ti-embedding"]  # type: ignore[attr-defined]
    assert json.loads(base64.b64decode(text)) == data


def test_a_pt_has_the_webui_keys_and_passes_its_checks(tmp_path: Path) -> None:
    path = write_embedding(embedding(), tmp_path / "my-cat.pt")
    assert_webui_safe(path)
    data = load_pickle(path)
    assert data["string_to_token"] == {"*": 265}
    assert list(data["string_to_param"]) == ["*"]
    assert type(data["string_to_param"]) is dict
    assert (data["name"], data["step"], data["sd_checkpoint"], data["sd_checkpoint_name"]) == (
        "my-cat",
        200,
        "0123456789",
        "pocket",
    )
    assert_webui_safe(write_embedding(embedding(), tmp_path / "my-cat.bin"))


def test_formats_of_other_trainers_are_read(tmp_path: Path) -> None:
    vectors = torch.randn(2, 32)
    forms: dict[str, tuple[Any, str]] = {
        "kohya.pt": ({"emb_params": vectors}, "kohya"),
        "learned_embeds.bin": ({"<cat-toy>": vectors[0]}, "<cat-toy>"),
        "half.pt": ({"string_to_param": {"*": vectors.half()}, "name": "inner"}, "half"),
    }
    for name, (data, word) in forms.items():
        read = read_embedding(save_pickle(data, tmp_path / name))
        assert (read.name, read.vectors.shape[1], read.vectors.dtype) == (word, 32, torch.float32)
    save_file({"emb_params": vectors}, tmp_path / "k.safetensors")
    assert read_embedding(tmp_path / "k.safetensors").name == "k"
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}, tmp_path / "paper.pt")
    assert read_embedding(tmp_path / "paper.pt").vectors.equal(vectors)
    assert read_embedding(save_pickle(vectors, tmp_path / "bare.pt"), name="cat").vectors.equal(vectors)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ".png", ".webp"])
def test_sdxl_pairs_round_trip_and_suit_the_webui(suffix: str, tmp_path: Path) -> None:
    second = torch.randn(3, 1280, generator=torch.Generator().manual_seed(9))
    written = replace(embedding(3, 768), vectors_2=second)
    path = write_embedding(written, tmp_path / f"my-cat{suffix}")
    read = read_embedding(path)
    assert read.vectors_2 is not None and torch.equal(read.vectors_2, second)
    assert_equal(read, written, whole=suffix == ".safetensors")
    if suffix == ".safetensors":
        held = load_file(path)
    elif suffix in (".pt", ".bin"):
        assert_webui_safe(path)
        held = torch.load(path, weights_only=True)
    else:
        held = read_image_embedding(path)
    # The webui requires a dict with both keys and treats every entry as a tensor.
    assert type(held) is dict and held.keys() == {"clip_l", "clip_g"}
    assert all(type(value) is torch.Tensor for value in held.values())
    assert (held["clip_l"].shape, held["clip_g"].shape) == ((3, 768), (3, 1280))
    with pytest.raises(FormatError, match="3 and 2"):
        write_embedding(replace(written, vectors_2=second[:2]), tmp_path / f"other{suffix}")


def test_kohya_format_is_named_after_the_file(tmp_path: Path) -> None:
    written = embedding(2, 768)
    path = write_embedding(written, tmp_path / "kohya" / "cat.safetensors", kohya=True)
    assert load_file(path).keys() == {"emb_params"}
    assert_equal(read_embedding(path), replace(written, name="cat"))
    pair = replace(written, vectors_2=torch.ones(2, 1280))
    assert load_file(write_embedding(pair, path, kohya=True)).keys() == {"clip_l", "clip_g"}


def test_other_content_is_rejected(tmp_path: Path) -> None:
    pair = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(2, 1280)}
    cases: list[tuple[Any, str]] = [
        (pair, "vectors"),
        ({**pair, "clip_g": "text"}, "a str where"),
        ({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, "2 entries"),
        (torch.ones(1, 2), "without a name"),
        ([1, 2], "no embedding"),
        ({"string_to_param": {}}, "exactly one"),
        ({"string_to_param": {"*": "text"}}, "a str where"),
        ({"a": torch.full((1, 2), float("nan"))}, "NaN"),
        ({"a": torch.ones(1, 2, 3)}, r"\[1, 2, 3\]"),
    ]
    for data, message in cases:
        with pytest.raises(FormatError, match=rf"x\.pt: .*{message}"):
            read_embedding(save_pickle(data, tmp_path / "x.pt"))
    (tmp_path / "x.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(FormatError, match="safetensors"):
        read_embedding(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="one of"):
        read_embedding(tmp_path / "x.txt")
    for suffix in (".safetensors", ".png", ".pt"):
        with pytest.raises(StorageError, match="missing"):
            read_embedding(tmp_path / f"missing{suffix}")


def test_invalid_embeddings_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="my-cat"):
        write_embedding(embedding(), tmp_path / "other.pt")
    with pytest.raises(FormatError, match="NaN"):
        write_embedding(Embedding("a", torch.full((1, 4), float("inf"))), tmp_path / "a.pt")
    with pytest.raises(FormatError, match="no name"):
        write_embedding(Embedding(" ", torch.ones(1, 4)), tmp_path / "a.pt")
    for suffix in (".jpg", ".txt"):
        with pytest.raises(FormatError, match="one of"):
            write_embedding(embedding(), tmp_path / f"my-cat{suffix}")
    assert list(tmp_path.iterdir()) == []


def _png(text: str | None = None, size: tuple[int, int] = (8, 8)) -> bytes:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    stream = io.BytesIO()
    Image.new("RGB", size, "white").save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def _with_text(payload: bytes) -> bytes:
    return _png(base64.b64encode(payload).decode())


def test_hostile_and_broken_images_raise_format_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _png()
    cases = {
        "no embedding": whole,
        r"not an? image": b"not an image",
        "damaged": whole[:-30],
        "text chunk": _png("***"),
        "nested too deeply": _with_text(b"[" * 100_000),
        "not the JSON": _with_text(b'{"a": '),
        "not the JSON of": _with_text(b'{"a": {"TORCHTENSOR": [[1], [1, 2]]}}'),
        "is not an embedding": _with_text(b"[1]"),
    }
    for message, content in cases.items():
        with pytest.raises(FormatError, match=message):
            read_image_embedding(content)
    monkeypatch.setattr(image_embedding, "MAX_PIXELS", 63)
    with pytest.raises(FormatError, match="8x8 pixels"):
        read_image_embedding(whole)
    monkeypatch.setattr(image_embedding, "MAX_JSON_BYTES", 10)
    monkeypatch.setattr(image_embedding, "MAX_PIXELS", 10**7)
    with pytest.raises(FormatError, match="embedding"):
        read_image_embedding(_with_text(b'{"a": "0123456789"}'))


def test_a_decompression_bomb_in_the_pixels_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = json.dumps({"name": "0" * 3_000_000}).encode()
    canvas = image_embedding._hide(
        np.full((64, 64, 3), 200, np.uint8), payload, decoration=np.ones(4, np.float32)
    )
    Image.fromarray(canvas).save(tmp_path / "bomb.png")
    monkeypatch.setattr(image_embedding, "MAX_JSON_BYTES", 1_000_000)
    with pytest.raises(FormatError, match="1000001 bytes"):
        read_image_embedding(tmp_path / "bomb.png")


def test_a_lossy_copy_carries_no_embedding(tmp_path: Path) -> None:
    path = write_embedding(embedding(), tmp_path / "my-cat.png")
    Image.open(path).convert("RGB").save(tmp_path / "copy.webp", quality=95)
    with pytest.raises(FormatError, match="loss"):
        read_embedding(tmp_path / "copy.webp")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_diffusers_loads_every_vector(suffix: str, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from tiny_models import tiny_model

    model = tiny_model()
    pipeline = StableDiffusionPipeline(
        **model.modules(),
        tokenizer=model.tokenizer,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    written = embedding(3, name="qzx")
    path = write_embedding(written, tmp_path / f"qzx{suffix}")
    pipeline.load_textual_inversion(str(path))
    table = pipeline.text_encoder.get_input_embeddings().weight
    words = ["qzx", "qzx_1", "qzx_2"]
    assert torch.equal(table[pipeline.tokenizer.convert_tokens_to_ids(words)], written.vectors)
    assert pipeline.maybe_convert_prompt("a qzx", pipeline.tokenizer) == "a qzx qzx_1 qzx_2"
