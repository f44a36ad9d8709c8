"""Test `data tags`: the effect of each edit on a caption, preservation of other content, and the tag list."""

from __future__ import annotations

import builtins
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.caption_files import Captions
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.tags import Edit, edit_caption, parse_replacement, read_captions


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, ["data", "tags", *(str(word) for word in words)])


@pytest.mark.parametrize(
    ("edit", "after"),
    [
        (Edit(), "1girl, red_hair, >_<, hat (red), 1girl"),
        (Edit(spaces=True), "1girl, red hair, >_<, hat (red), 1girl"),
        (
            Edit(replace=(("red hair", "blue hair, long hair"),)),
            "1girl, blue hair, long hair, >_<, hat (red), 1girl",
        ),
        (Edit(replace=(("1girl", ""),)), "red_hair, >_<, hat (red)"),
        (Edit(remove=("*red*",)), "1girl, >_<, 1girl"),
        (Edit(remove=("red", "hat \\(red\\)")), "1girl, red_hair, >_<, 1girl"),
        (Edit(dedupe=True), "1girl, red_hair, >_<, hat (red)"),
        (Edit(sort=True), "1girl, 1girl, >_<, hat (red), red_hair"),
        (
            Edit(add=("smile", "red hair"), prepend=("solo",)),
            "solo, 1girl, red_hair, >_<, hat (red), 1girl, smile",
        ),
        (Edit(trigger="sks"), "sks, 1girl, red_hair, >_<, hat (red), 1girl"),
        (Edit(trigger="red hair", dedupe=True), "red hair, 1girl, >_<, hat (red)"),
        (Edit(escape=True), r"1girl, red_hair, >_<, hat \(red\), 1girl"),
    ],
)
def test_edits(edit: Edit, after: str) -> None:
    assert edit_caption("1girl, red_hair, >_<, hat (red), 1girl", edit) == after
    again = edit_caption(after, edit)
    assert again == after  # edits are idempotent


def test_each_line_is_a_caption_and_emoticons_are_tags() -> None:
    assert edit_caption("a_b, c\n\nd", Edit(spaces=True, add=("e",))) == "a b, c, e\nd, e"
    assert parse_replacement("=_==>>_<") == ("=_=", ">_<")
    with pytest.raises(DataError, match="old=new"):
        parse_replacement("nothing")


def write_set(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.jpg", "sub/d.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "a.txt").write_text("cat, red_hair")
    (folder / "sub" / "d.png.caption").write_text("dog, red hair")
    lines = [
        {"file_name": "b.png", "text": "cat, hat", "score": 1},
        {"file_name": "a.png", "text": "not used"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_captions_are_edited_in_place_with_a_backup(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    table = (folder / "metadata.jsonl").read_text()
    result = run(folder, "--replace", "cat=tiger", "--underscores-to-spaces", "--in-place", "--json")
    assert result.exit_code == 0, result.output
    message = json.loads(result.stdout)
    assert message["changed"]["a.png"] == {"before": "cat, red_hair", "after": "tiger, red hair"}
    assert (folder / "a.txt").read_text() == "tiger, red hair\n"
    assert (folder / "sub" / "d.png.caption").read_text() == "dog, red hair"  # unchanged, so not written
    first, second = (json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines())
    assert first == {"file_name": "b.png", "text": "tiger, hat", "score": 1} and second["text"] == "not used"
    backup = Path(message["backup"])
    assert (backup / "a.txt").read_text() == "cat, red_hair"
    assert (backup / "metadata.jsonl").read_text() == table
    assert set(read_captions(str(folder)).texts) == {"a.png", "b.png", "c.jpg", "sub/d.png"}


def test_captions_are_written_to_another_folder(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    dry = run(folder, "--add", "solo", "--dry-run")
    assert "- cat, red_hair\n+ cat, red_hair, solo" in dry.stdout and "3 of 3" in dry.stdout
    out = tmp_path / "out"
    assert run(folder, "--trigger", "sks", "--create", "--out", out).exit_code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (out / "c.txt").read_text() == "sks\n" and (
        out / "sub" / "d.txt"
    ).read_text() == "sks, dog, red hair\n"
    assert run(folder, "--trigger", "sks", "--out", out).exit_code == 2


def test_without_an_edit_tags_are_listed(tmp_path: Path) -> None:
    shown = run(write_set(tmp_path / "set"), "--top", 1)
    assert shown.stdout == "     2  cat\n"


def test_invalid_edits_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    assert "--in-place" in run(folder, "--add", "x").stderr
    assert run(folder, "--replace", "x", "--dry-run").exit_code == 2
    assert run(tmp_path / "nowhere").exit_code == 2
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\nb.png,cat\n")
    result = run(folder, "--add", "x", "--in-place")
    assert result.exit_code == 2 and "metadata.csv" in result.stderr
    assert (folder / "a.txt").read_text() == "cat, red_hair"


class FarAway(Storage):
    """A folder with the latency of a bucket."""

    is_local = False

    def exists(self, rel: str = "") -> bool:
        return True

    def list(self, rel: str = "", recursive: bool = False, **more: Any) -> builtins.list[str]:
        return sorted(path.name for path in Path(self.url).iterdir())

    def read_bytes(self, rel: str = "") -> bytes:
        time.sleep(0.02)
        return (Path(self.url) / rel).read_bytes()


def test_captions_in_a_bucket_are_read_in_parallel(tmp_path: Path) -> None:
    names = [f"{number:03d}.png" for number in range(100)]
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
        (tmp_path / name).touch()
    captions = Captions(ImageFolder(FarAway(tmp_path)))
    began = time.monotonic()
    assert captions.of_all(names) == [f"caption of {name}" for name in names]
    assert time.monotonic() - began < 1
