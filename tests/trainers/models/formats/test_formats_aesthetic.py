"""Test aesthetic vector files: round trips, the webui's checks, published forms, malicious files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import DTYPES, VALUES, assert_survives, damaged, torch_files
from hypothesis import strategies as st
from webui_safety import assert_webui_safe

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.aesthetic import read_aesthetic, write_aesthetic
from dreamfleet.trainers.models.formats.pickle_writer import save_pickle

VECTOR = torch.randn(1, 768, generator=torch.Generator().manual_seed(0)) * 0.5


def saved(value: Any, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def test_a_vector_round_trips_in_the_webui_format(tmp_path: Path) -> None:
    path = write_aesthetic(torch.nn.Parameter(VECTOR), tmp_path / "taste.pt")
    assert_webui_safe(path)
    assert torch.equal(read_aesthetic(path), VECTOR)
    plain = torch.load(path, weights_only=True)
    assert type(plain) is torch.Tensor and plain.shape == (1, 768) and plain.dtype == torch.float32
    write_aesthetic(VECTOR[0], path)
    assert torch.load(path, weights_only=True).shape == (1, 768), "the extension's slerp needs two dimensions"
    with pytest.raises(FormatError, match=r"\.pt"):
        write_aesthetic(VECTOR, tmp_path / "taste.png")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 768), (768,)])
def test_published_forms_are_read(
    shape: tuple[int, ...], dtype: torch.dtype, zipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "sac_8plus.pt"
    path.write_bytes(saved(VECTOR.reshape(shape).to(dtype), zipped=zipped))
    found = read_aesthetic(path)
    assert found.shape == (1, 768) and found.dtype == torch.float32
    assert torch.equal(found, VECTOR.to(dtype).float())


def test_a_vector_saved_from_a_gpu_is_read_on_the_cpu(tmp_path: Path) -> None:
    content = saved(VECTOR[0], zipped=False)
    assert content.count(b"X\x03\x00\x00\x00cpu") == 1
    (tmp_path / "laion_7plus.pt").write_bytes(
        content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    )
    assert torch.equal(read_aesthetic(tmp_path / "laion_7plus.pt"), VECTOR)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 768), r"not \[2, 768\]"),
        (torch.ones(1, 1, 768), r"not \[1, 1, 768\]"),
        (torch.tensor(1.0), r"not \[\]"),
        (torch.ones(1, 0), r"not \[1, 0\]"),
        (torch.ones(1).expand(1, 2**30), r"not \[1, 1073741824\]"),
        (torch.zeros(1, 768), "no direction"),
        (torch.full((768,), float("nan")), "no direction"),
        (torch.ones(768, dtype=torch.int64), "aesthetic"),
        (torch.ones(768).to_sparse(), "aesthetic"),
        ({"string_to_param": {"*": torch.ones(1, 768)}}, "embedding"),
    ],
)
def test_other_content_is_rejected(value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(value))
    with pytest.raises(FormatError, match=message):
        read_aesthetic(tmp_path / "a.pt")
    if isinstance(value, torch.Tensor) and "no direction" in message:
        with pytest.raises(FormatError, match=message):
            write_aesthetic(value, tmp_path / "b.pt")


def check(path: Path) -> None:
    found = read_aesthetic(path)
    assert found.ndim == 2 and len(found) == 1 and found.dtype == torch.float32 and found.any()


SIZES = st.lists(st.sampled_from([0, 1, 1, 2, 16, 768, 2**15]), max_size=3)
VECTORS = st.builds(
    lambda sizes, dtype: torch.ones([1] * len(sizes), dtype=dtype).expand(sizes), SIZES, DTYPES
)


def test_fuzzed_objects_raise_format_errors(tmp_path: Path) -> None:
    assert_survives(check, tmp_path / "fuzz.pt", torch_files(VECTORS | VALUES), examples=150)


def test_damaged_files_raise_format_errors(tmp_path: Path) -> None:
    whole = save_pickle(VECTOR[:, :16].clone(), tmp_path / "a.pt").read_bytes()
    assert_survives(check, tmp_path / "fuzz.pt", damaged(whole), examples=150)
