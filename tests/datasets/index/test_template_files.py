"""Test files of prompt templates."""

from __future__ import annotations

import pytest

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.template_files import load_template_file


def test_template_file(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfa photo of [name]\r\n\r\n  [filewords]  \n")
    assert load_template_file(str(path)) == ("a photo of [name]", "[filewords]")
    path.write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        load_template_file(str(path))
    path.write_bytes(b"caf\xe9 [name]")
    with pytest.raises(DataError, match=r"0xe9 .*3, line 1"):
        load_template_file(str(path))
    with pytest.raises(DataError, match="does not exist"):
        load_template_file(str(tmp_path / "none.txt"))
