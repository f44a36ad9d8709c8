"""Test pickle files: the webui's rules (both versions, implemented here), safe loading, damaged files."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from webui_safety import NAMES_1_9_4, NAMES_1_10_1, assert_webui_safe, objections

from dreamfleet.datasets.errors import FormatError, StorageError
from dreamfleet.trainers.models.formats.pickle_writer import (
    load_pickle,
    parameters_of,
    replacing,
    save_pickle,
)


def sample_object() -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {
        "name": "kätzchen",
        "step": 12,
        "big": 2**70,
        "rate": 0.5,
        "none": None,
        "yes": True,
        320: ({"w": torch.ones(2, 2, dtype=torch.float16)}, {"b": torch.zeros(3, dtype=torch.bfloat16)}),
        "list": [1, "a", (2, 3)],
        "long": torch.tensor([1, 2**40]),
        "bytes": torch.tensor([1, 2], dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
        "shared": shared,
        "same": shared,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_the_checker_rejects_files_of_current_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pt")
    assert any("format_version" in name for name in objections(tmp_path / "plain.pt", NAMES_1_10_1))
    assert any("byteorder" in name for name in objections(tmp_path / "plain.pt", NAMES_1_9_4))


def test_a_written_file_passes_both_webui_versions_and_round_trips(tmp_path: Path) -> None:
    path = save_pickle(sample_object(), tmp_path / "my cat.v2.pt")
    assert_webui_safe(path)
    assert same(sample_object(), load_pickle(path))
    assert same(sample_object(), load_pickle(path.read_bytes()))
    stock = torch.load(path, weights_only=True)
    assert stock["shared"].data_ptr() == stock["same"].data_ptr()
    assert same(sample_object()["long"], torch.load(path, weights_only=True, mmap=True)["long"])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_tensor_data_is_aligned_and_files_are_reproducible(tmp_path: Path) -> None:
    first, second = (save_pickle(sample_object(), tmp_path / str(i) / "a.pt") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    data = first.read_bytes()
    with zipfile.ZipFile(first) as archive:
        for entry in archive.infolist():
            name, extra = (int.from_bytes(data[entry.header_offset + at :][:2], "little") for at in (26, 28))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0


def test_parameters_views_and_ordered_dicts_become_plain(tmp_path: Path) -> None:
    big = torch.randn(100_000)
    layer = torch.nn.Linear(3, 2)
    path = save_pickle(
        {"state": layer.state_dict(), "p": layer.weight, "view": big[:3], "turned": big[:6].view(2, 3).T},
        tmp_path / "a.pt",
    )
    assert_webui_safe(path)
    assert path.stat().st_size < 10_000
    read = load_pickle(path)
    assert type(read["state"]) is dict
    assert type(read["p"]) is torch.Tensor
    assert not read["p"].requires_grad
    assert torch.equal(read["view"], big[:3])
    assert torch.equal(read["turned"], big[:6].view(2, 3).T)


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.0),
        np.ones(2),
        {1, 2},
        b"bytes",
        torch.float16,
        torch.Size([1]),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, device="meta"),
        torch.ones(2).to_sparse(),
        Path("a"),
        {1.5: "x"},
        2**3000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_types_that_the_webui_rejects_are_rejected_when_writing(value: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="outer"):
        save_pickle({"outer": [value]}, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("boom",))


def test_code_in_a_pickle_is_named_and_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Bomb()}, tmp_path / "zip.pt")
    torch.save({"a": Bomb()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "old.pt"):
        with pytest.raises(FormatError, match=rf"{name}: .*print.*safetensors"):
            load_pickle(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_broken_files_raise_specific_errors(tmp_path: Path) -> None:
    good = save_pickle({"a": torch.randn(1000)}, tmp_path / "good.pt").read_bytes()
    cases = {
        "empty.pt": (b"", "empty"),
        "cut.pt": (good[: len(good) // 2], "truncated"),
        "text.pt": (b"hello there, this is no tensor", "not a PyTorch file|truncated"),
        "html.pt": (b"<html>404</html>" * 20, "not a PyTorch file"),
        "stream.pt": (pickle.dumps({"a": list(range(100))}, protocol=4), "not a PyTorch file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=rf"{name}: .*({message})"):
            load_pickle(tmp_path / name)
    with pytest.raises(StorageError, match=r"missing\.pt"):
        load_pickle(tmp_path / "missing.pt")


def test_flipped_bytes_raise_only_format_errors() -> None:
    buffer = io.BytesIO()
    torch.save({"name": "cat", "v": torch.ones(2, 2)}, buffer, _use_new_zipfile_serialization=False)
    good = buffer.getvalue()
    for at in range(0, len(good), 3):
        broken = bytearray(good)
        broken[at] ^= 0x5A
        try:
            load_pickle(bytes(broken))
        except FormatError:
            pass


def test_files_of_older_trainers_are_read(tmp_path: Path) -> None:
    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = (
        "pytorch_lightning.callbacks.model_checkpoint",
        "ModelCheckpoint",
    )
    stream = pickle.dumps({"state_dict": 1, "rate": 2.5}, protocol=2)
    with_globals = stream[:-1].removesuffix(b"u") + (
        b"X\x09\x00\x00\x00callbacksc"
        b"pytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)R"
        b"X\x04\x00\x00\x00lossc"
        b"numpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tR(K\x03tbX\x08\x00\x00\x00abcdefghtRu."
    )
    with zipfile.ZipFile(tmp_path / "old.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", with_globals)
        archive.writestr("archive/version", "3\n")
    assert load_pickle(tmp_path / "old.ckpt")["rate"] == 2.5

    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 4))})
    torch.save({"string_to_param": held, "order": OrderedDict(a=1)}, tmp_path / "ti.pt")
    read = load_pickle(tmp_path / "ti.pt")
    assert torch.equal(parameters_of(read["string_to_param"])["*"], torch.ones(2, 4))


def _write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("half way")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = save_pickle({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="half way"):
        _write_half(path)
    assert load_pickle(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="disk is full"), replacing(path):
        raise OSError(28, "No space left on device")
    assert load_pickle(path) == {"a": 1}
    (tmp_path / "blocked").write_text("")
    with pytest.raises(StorageError, match="blocked"):
        save_pickle({}, tmp_path / "blocked" / "a.pt")


def test_a_pickle_of_another_protocol_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(FormatError, match="UnpicklingError"):  # torch's warning would be an error here
        load_pickle(path)
