"""Test the rules for files of an image folder, shared by all commands: pairing, skipped files, reports."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from image_files import image, put
from PIL import Image
from servers import S3Server, s3_server  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.caption_files import Captions
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.index.labels import find_labels
from dreamfleet.datasets.index.sets import load_class_images, load_held_out, load_sets
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.caption_set import caption_set
from dreamfleet.datasets.tools.captions import Composition
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.run import run_worker

NFC, NFD = (unicodedata.normalize(form, "caf\N{LATIN SMALL LETTER E WITH ACUTE}") for form in ("NFC", "NFD"))


def run(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def fill(folder: Path, files: dict[str, str | bytes | None]) -> Path:
    """Write the files into the folder; None as content writes an image. Return the folder."""
    for seed, (name, content) in enumerate(files.items()):
        kind = "JPEG" if name.lower().endswith("jpg") else "PNG"
        put(folder, name, image(seed, (24, 24), kind) if content is None else content)
    return folder


def captions(folder: Path, **how: Any) -> dict[str, str | None]:
    files = ImageFolder(str(folder), **how)
    return dict(zip(files.images, Captions(files).of_all(files.images), strict=True))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        # The most specific file name takes precedence over the order of extensions.
        ({"x.jpg": None, "x.png": None, "x.txt": "s", "x.jpg.txt": "w"}, {"x.jpg": "w", "x.png": "s"}),
        ({"x.jpg": None, "x.txt": "s", "x.jpg.caption": "w"}, {"x.jpg": "w"}),
        ({"x.jpg": None, "x.png": None, "x.txt": "both"}, {"x.jpg": "both", "x.png": "both"}),
        # A file with an image's full name belongs to that image only.
        ({"x.jpg": None, "x.jpg.png": None, "x.jpg.txt": "w"}, {"x.jpg": "w", "x.jpg.png": None}),
        ({"a.txt.png": None, "a.png": None, "a.txt": "a"}, {"a.txt.png": None, "a.png": "a"}),
        # Extensions in upper, lower or mixed case.
        ({"a.JPG": None, "b.png": None, "a.TXT": "a", "b.CAPTION": "b"}, {"a.JPG": "a", "b.png": "b"}),
        ({"a.jpg": None, "a.JPG.Txt": "a"}, {"a.jpg": "a"}),
        ({"a.png": None, "METADATA.JSONL": '{"file_name": "a.PNG", "Text": "a"}'}, {"a.png": "a"}),
        ({"a.png": None, "Metadata.CSV": "File_Name, caption\na.png,a"}, {"a.png": "a"}),
        # Either Unicode normal form, in file names and in tables.
        ({f"{NFD}.png": None, f"{NFC}.txt": "a"}, {f"{NFD}.png": "a"}),
        ({f"{NFC}/{NFC}.png": None, f"{NFD}/{NFD}.png.txt": "a"}, {f"{NFC}/{NFC}.png": "a"}),
        ({f"{NFC}.png": None, "metadata.jsonl": json.dumps({"file_name": f"{NFD}.png", "text": "a"})},
         {f"{NFC}.png": "a"}),
        # Tables written by other operating systems and programs.
        ({"s/a.png": None, "metadata.csv": "file_name,prompt\ns\\a.png,a"}, {"s/a.png": "a"}),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "./a.png", "text": ["one", "two"]}'}, {"a.png": "one\ntwo"}),
        ({"a.png": None, "metadata.jsonl": b'\xef\xbb\xbf{"file_name": "a", "text": "a"}'}, {"a.png": "a"}),
    ],
)  # fmt: skip
def test_caption_files_are_matched_to_images(
    tmp_path: Path, files: dict[str, str | bytes | None], found: dict[str, str | None]
) -> None:
    assert captions(fill(tmp_path, files)) == found


def test_both_unicode_forms_of_a_name_are_two_images(tmp_path: Path) -> None:
    files = {f"{NFC}.png": None, f"{NFD}.png": None, f"{NFC}.txt": "composed", f"{NFD}.txt": "not"}
    assert captions(fill(tmp_path, files)) == {f"{NFC}.png": "composed", f"{NFD}.png": "not"}


def test_tables_of_parquet_and_other_columns(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": None})
    pq.write_table(pa.table({"file_name": ["a.png"], "description": ["a"]}), tmp_path / "metadata.parquet")
    with pytest.raises(
        DataError, match=r"metadata\.parquet.*description.*text or caption or prompt.*caption_column"
    ):
        build_index(str(tmp_path))
    assert build_index(str(tmp_path), ScanOptions(caption_column="Description")).column("caption") == ["a"]
    shown = run("data", "inspect", tmp_path)
    assert shown.exit_code == 2 and "description" in shown.stderr
    assert "captions   1 of 1" in run("data", "inspect", tmp_path, "data.caption_column=description").stdout
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"metadata\.parquet is not a readable Parquet"):
        build_index(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "table", "keyword"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "label": 3}', "label"),
        ("metadata.csv", "file,text\na.png,a", "file, text"),
        ("metadata.csv", "file_name;text\na.png;a", "file_name;text"),
        ("metadata.jsonl", '{"file_name": "img/a.png", "text": "a"}', r"img/a\.png"),
        ("metadata.jsonl", '{"file_name": "b.png", "text": "b"}', "none of the 1 images"),
    ],
)
def test_a_table_that_names_no_captions_or_no_images_is_an_error(
    tmp_path: Path, name: str, table: str, keyword: str
) -> None:
    fill(tmp_path, {"a.png": None, name: table})
    with pytest.raises(DataError, match=keyword):
        build_index(str(tmp_path))


def test_a_caption_column_without_a_table_is_an_error(tmp_path: Path) -> None:
    data = DataConfig(instance_data_dir=str(fill(tmp_path, {"a.png": None})), caption_column="words")
    with pytest.raises(DataError, match="words"):
        load_sets(data)


def test_a_folder_is_found_in_either_unicode_form(tmp_path: Path) -> None:
    fill(tmp_path / NFD, {"a.png": None})
    assert len(build_index(str(tmp_path / NFC))) == 1


def test_all_captions_that_are_not_text_are_named_at_once(tmp_path: Path) -> None:
    bad = {"a.txt": b"caf\xe9", "b.txt": "a cat".encode("utf-16"), "c.txt": "a cat".encode("utf-16-le")}
    fill(
        tmp_path,
        {"a.png": None, "b.png": None, "c.png": None, "d.png": None, "d.txt": b"\xef\xbb\xbfd", **bad},
    )
    fill(tmp_path, {"metadata.jsonl": b'{"file_name": "a.png", "text": "\xff"}'})
    for words in (("inspect",), ("tags",), ("prepare", tmp_path / "out")):
        shown = run("data", words[0], tmp_path, *words[1:])
        assert shown.exit_code == 2
        assert all(name in shown.stderr for name in (*bad, "metadata.jsonl", "4 captions", "UTF-16"))
        assert "d.txt" not in shown.stderr
    assert not (tmp_path / "out").exists()


# ---- writers -----------------------------------------------------------------------------------------------


def shared_stems(folder: Path) -> Path:
    files: dict[str, str | bytes | None] = dict.fromkeys(("a.png", "x.jpg", "x.png", "s/x.png"))
    return fill(folder, {**files, "a.txt": "a", "x.jpg.txt": "x jpg", "x.png.txt": "x png", "s/x.txt": "s x"})


def test_editing_tags_loses_no_caption(tmp_path: Path) -> None:
    source = shared_stems(tmp_path / "set")
    assert run("data", "tags", source, "--add", "new", "--out", tmp_path / "out").exit_code == 0
    written = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_text()
        for path in (tmp_path / "out").rglob("*.txt")
    }
    assert written == {
        "a.txt": "a, new\n", "x.jpg.txt": "x jpg, new\n", "x.png.txt": "x png, new\n", "s/x.txt": "s x, new\n"
    }  # fmt: skip
    # Captions written beside the same images are read back unchanged.
    for name, text in written.items():
        put(source, name, text)
    assert captions(source) == {
        "a.png": "a, new",
        "x.jpg": "x jpg, new",
        "x.png": "x png, new",
        "s/x.png": "s x, new",
    }


def test_a_shared_caption_is_written_per_image_where_edits_differ(tmp_path: Path) -> None:
    from dreamfleet.datasets.tools.tags import read_captions, write_captions

    fill(tmp_path, {"x.jpg": None, "x.png": None, "x.txt": "both"})
    assert run("data", "tags", tmp_path, "--add", "new", "--in-place").exit_code == 0
    assert (tmp_path / "x.txt").read_text() == "both, new\n" and not list(tmp_path.glob("x.*.txt"))
    write_captions(read_captions(str(tmp_path)), {"x.jpg": "one", "x.png": "two"}, None)
    assert captions(tmp_path) == {"x.jpg": "one", "x.png": "two"}
    assert "x.txt: x.jpg, x.png" in run("data", "inspect", shared(tmp_path / "again")).stdout


def shared(folder: Path) -> Path:
    return fill(folder, {"x.jpg": None, "x.png": None, "x.txt": "both"})


def describe_by_colour() -> Any:
    """A stand-in for a captioner: the red value of the first pixel."""
    return lambda images: [f"red {picture.getpixel((0, 0))[0]}" for picture in images]


def test_captions_by_a_model_are_written_to_separate_files(tmp_path: Path) -> None:
    makers = {"colour": describe_by_colour}

    def described(folder: Path) -> dict[str, str]:
        found = describe_by_colour()
        return {
            path.name: found([Image.open(path).convert("RGB")])[0]
            for path in folder.iterdir()
            if path.suffix in (".png", ".jpg")
        }

    fill(tmp_path / "set", {"x.jpg": None, "x.png": None, "y.png": None, "y.TXT": " "})
    how = Composition(("colour",))
    caption_set(str(tmp_path / "set"), makers, how, out=str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["x.jpg.txt", "x.png.txt", "y.txt"]
    caption_set(str(tmp_path / "set"), makers, how)
    assert captions(tmp_path / "set") == described(tmp_path / "set")
    assert not (tmp_path / "set" / "y.txt").exists()  # y.TXT, which is empty, existed before and was used
    fill(tmp_path / "shared", {"x.jpg": None, "x.png": None, "x.txt": "both"})
    for existing in ("append", "replace"):
        caption_set(str(tmp_path / "shared"), makers, Composition(("colour",), existing=existing))
    assert captions(tmp_path / "shared") == described(tmp_path / "shared")


def test_images_with_the_same_stem_are_prepared_separately(tmp_path: Path) -> None:
    source = shared_stems(tmp_path / "set")
    for name in ("x.jpg.mask.png", "a.MASK.PNG"):
        put(source, name, image(7, (24, 24)))
    shown = run("data", "prepare", source, tmp_path / "out", "--size", 16, "--workers", 1)
    assert shown.exit_code == 0, shown.stderr
    assert captions(tmp_path / "out") == {
        "a.png": "a",
        "x-jpg.png": "x jpg",
        "x-png.png": "x png",
        "s/x.png": "s x",
    }
    masks = ImageFolder(str(tmp_path / "out")).masks
    assert {name: Path(mask).name for name, mask in masks.items()} == {
        "a.png": "a.mask.png", "x-jpg.png": "x-jpg.mask.png"
    }  # fmt: skip


def test_masks_are_matched_by_full_name_or_stem(tmp_path: Path) -> None:
    fill(tmp_path / "set", dict.fromkeys(("x.jpg", "x.png", "y.png", "x.mask.png", "x.jpg.mask.png")))
    found = ImageFolder(str(tmp_path / "set"))
    assert found.images == ["x.jpg", "x.png", "y.png"]
    assert {name: Path(mask).name for name, mask in found.masks.items()} == {
        "x.jpg": "x.jpg.mask.png", "x.png": "x.mask.png"
    }  # fmt: skip
    fill(tmp_path / "masks", dict.fromkeys(("x.png", "x.jpg", "Y.png", "y.PNG")))
    apart = ImageFolder(str(tmp_path / "set"), mask_dir=str(tmp_path / "masks")).masks
    assert {name: Path(mask).name for name, mask in apart.items()} == {
        "x.jpg": "x.jpg", "x.png": "x.png", "y.png": "y.PNG"
    }  # fmt: skip
    inside = fill(tmp_path / "in", {"a.png": None, "masks/a.png": None})
    files = ImageFolder(str(inside), mask_dir=str(inside / "masks"))
    assert files.images == ["a.png"] and list(files.masks) == ["a.png"]


def test_a_mask_without_its_image_is_reported(tmp_path: Path) -> None:
    fill(tmp_path, dict.fromkeys(("a.png", "a.mask.png", "b.mask.png")))
    files = ImageFolder(str(tmp_path))
    assert files.images == ["a.png"]
    assert [(Path(item.uri).name, "mask" in item.reason) for item in files.bad] == [("b.mask.png", True)]


def test_labels_name_images_in_either_unicode_form(tmp_path: Path) -> None:
    fill(tmp_path, {f"{NFC}.png": None, "s/a.JPG": None})
    put(tmp_path, "dataset.json", json.dumps({f"{NFD}.png": 1, "s\\a.jpg": 2}))
    index = build_index(str(tmp_path))
    found = find_labels(index, [str(tmp_path)])
    assert sorted(found.values()) == [1, 2]


# ---- skipped files -----------------------------------------------------------------------------------------

RUN_FILES: dict[str, str | bytes | None] = {
    "recipe.yaml": "x", "metrics.jsonl": "", "samples/step-000000.png": None, "exports/cat.png": None
}  # fmt: skip


def within(folder: str, files: dict[str, str | bytes | None]) -> dict[str, str | bytes | None]:
    return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    ("files", "place", "reason"),
    [
        (within("runs/one", RUN_FILES), "runs/one", "a run"),
        (within("one", {"recipe.yaml": "", "samples/real.png": None}), "one", "a run"),
        (within("one", {"recipe.yaml": "", "checkpoints/step-000001/manifest.json": "", "b.png": None}),
         "one", "a run"),
        (within("find", {"search.yaml": "", "trials.json": "", "trials/00001/x.png": None}), "find", "a search"),
        (within("class", {"class-images.json": "", "000000.png": None}), "class", "class images"),
        ({"class-images/a-cat-0123456789ab/000000.png": None}, "class-images/a-cat-0123456789ab", "class images"),
        *[
            ({f"{name}/b.png": None}, name, "system")
            for name in (
                "@eaDir", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found", "System Volume Information", "__MACOSX",
                ".Trash", "#recycle", ".ipynb_checkpoints", "sub/@eaDir",
            )
        ],
    ],
)  # fmt: skip
def test_folders_without_training_images(
    tmp_path: Path, files: dict[str, str | bytes | None], place: str, reason: str
) -> None:
    fill(tmp_path, {"a.png": None, **files})
    index = build_index(str(tmp_path))
    assert [Path(uri).name for uri in index.column("uri")] == ["a.png"]
    (skipped,) = index.skipped
    assert skipped.place == str(tmp_path / place) and reason in skipped.reason
    shown = run("data", "inspect", tmp_path)
    assert f"{tmp_path / place}: {skipped.reason}" in shown.stdout
    assert (
        json.loads(run("data", "inspect", tmp_path, "--json").stdout)["skipped"][0]["reason"]
        == skipped.reason
    )


@pytest.mark.parametrize(
    "files",
    [
        {"sub/recipe.yaml": "soup", "sub/b.png": None},
        {"samples/b.png": None, "exports/c.png": None, "runs/d.png": None, "metrics.jsonl": ""},
        {"lost and found/b.png": None, "recycled paper/b.png": None},
    ],
)
def test_folders_are_recognised_by_their_content(
    tmp_path: Path, files: dict[str, str | bytes | None]
) -> None:
    fill(tmp_path, files)
    images = [name for name, content in files.items() if content is None]
    assert ImageFolder(str(tmp_path)).images == sorted(images)


def test_a_run_folder_is_refused_and_its_samples_are_read(tmp_path: Path) -> None:
    fill(tmp_path, RUN_FILES)
    with pytest.raises(DataError, match="a run of dreamfleet"):
        build_index(str(tmp_path))
    assert len(build_index(str(tmp_path / "samples"))) == 1


def test_held_out_and_class_images_inside_the_set(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {"a.png": None, "hold/b.png": None, "class/c.png": None, "class/sub/d.tif": None, "out/e.png": None},
    )
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    recipe = build_recipe(
        {
            "method": {"name": "dreambooth"},
            "data": {
                "instance_data_dir": str(tmp_path / "link"), "instance_prompt": "x",
                "class_data_dir": str(tmp_path / "class"), "class_prompt": "y",
            },
            "validation": {"holdout": str(tmp_path / "hold")},
            "output_dir": str(tmp_path / "out"),
        }
    )  # fmt: skip
    sets = load_sets(recipe.data, excluded=recipe.excluded_folders)
    assert [Path(uri).name for uri in sets.instances.column("uri")] == ["a.png"]
    reported = {Path(item.place).name: item.reason for item in sets.instances.skipped}
    assert set(reported) == {"hold", "class", "out"} and "held-out" in reported["hold"]
    classes = load_class_images(str(tmp_path / "class"), recipe.data)
    assert classes is not None and len(classes) == 2
    # Conversely, training images inside the held-out or class folder.
    inner = recipe.data.model_copy(update={"instance_data_dir": str(tmp_path / "hold")})
    assert "b.png" not in [Path(uri).name for uri in load_held_out(str(tmp_path), inner).column("uri")]
    same = recipe.data.model_copy(update={"class_data_dir": str(tmp_path)})
    with pytest.raises(DataError, match="named twice"):
        load_sets(same)


def test_files_that_should_be_images_are_reported(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "a.png": None, "noending": image(1), "b.jpg_large": image(2, kind="JPEG"), "c.heic": b"x",
            "c.txt": "of c", "d.CR2": b"x", "e.svg": "<svg/>", "f.MP4": b"x", "orphan.txt": "x", "notes.md": "x",
            "LICENSE": "text", "Thumbs.db": "x", "._a.png": b"x",
            "embedding.png": image(3)[:8] + b"....tEXtsd-ti-embedding" + image(3)[8:],
        },
    )  # fmt: skip
    index = build_index(str(tmp_path))
    assert [Path(uri).name for uri in index.column("uri")] == ["a.png"]
    bad = {Path(item.uri).name: item.reason for item in index.bad}
    assert set(bad) == {"noending", "b.jpg_large", "c.heic", "d.CR2", "e.svg", "f.MP4", "embedding.png"}
    assert "PNG" in bad["noending"] and "JPEG" in bad["b.jpg_large"] and "Convert" in bad["d.CR2"]
    (orphans,) = index.skipped
    # c.txt is not an orphan: it belongs to an unreadable image.
    assert "orphan.txt" in orphans.reason and orphans.files == 1
    shown = run("data", "inspect", tmp_path).stdout
    assert "orphan.txt" in shown and ".md: 1" in shown and "hidden and system files: 2" in shown


def test_names_that_are_not_utf8_are_reported(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    fill(tmp_path, {"good.png": None, "x.png": None, "dir/y.png": None})
    os.rename(root + b"/x.png", root + b"/caf\xe9.png")
    os.rename(root + b"/dir", root + b"/d\xff")
    (tmp_path / "plain.txt").write_text("x")
    os.rename(root + b"/plain.txt", root + b"/caf\xe9.txt")
    index = build_index(str(tmp_path))
    assert [Path(uri).name for uri in index.column("uri")] == ["good.png"]
    assert {Path(item.uri).name for item in index.bad} == {r"caf\xe9.png", r"caf\xe9.txt", r"d\xff"}
    shown = run("data", "inspect", tmp_path)
    assert shown.exit_code == 0 and r"caf\xe9.png" in shown.stdout
    assert any(
        r"caf\xe9.png" in name
        for name in json.loads(run("data", "inspect", tmp_path, "--json").stdout)["bad"]
    )
    for words in (("tags", "--add", "x", "--create", "--out"), ("prepare", "--size", 16, "--workers", 1)):
        assert run("data", words[0], tmp_path, *words[1:], Path(f"{tmp_path}-{words[0]}")).exit_code == 0
    with pytest.raises(DataError, match=r"d\\xff"):
        build_index(os.fsdecode(root + b"/d\xff"))


@pytest.mark.s3
def test_a_bucket_is_read_like_a_disk(
    tmp_path: Path,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    files: dict[str, str | bytes | None] = {
        "x.jpg": None, "x.png": None, "x.jpg.TXT": "w", "x.txt": "s", f"{NFD}.png": None, f"{NFC}.txt": "a",
        "noending": image(9), "empty": b"", "@eaDir/b.png": None, **within("runs/one", RUN_FILES),
        "Metadata.csv": "file_name,text\nx.jpg,t",
    }  # fmt: skip
    fill(tmp_path, files)
    bucket = s3_server.new_folder()
    Storage(bucket).upload(tmp_path, "set")
    one, other = build_index(str(tmp_path)), build_index(f"{bucket}/set")
    assert other.content_hash == one.content_hash and sorted(one.column("caption")) == ["a", "s", "w"]
    assert [item.reason for item in other.bad] == [item.reason for item in one.bad] and len(other.bad) == 1
    assert [item[1:] for item in other.skipped] == [item[1:] for item in one.skipped]


# ---- runs --------------------------------------------------------------------------------------------------


def test_a_resumed_run_within_its_data_folder_is_not_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = tiny.make_recipe(tmp_path)
    images = Path(tree["data"]["instance_data_dir"])
    tree["output_dir"] = str(images / "runs" / "one")
    first = run_worker(build_recipe(tree), should_stop=tiny.Stop(1))
    assert list((images / "runs" / "one").rglob("*.png"))
    with caplog.at_level("INFO"):
        second = run_worker(build_recipe(tree), resume=True)
    assert second.dataset_hash == first.dataset_hash and "dataset_hash changed" not in caplog.text
    assert sum(record.message.startswith("skipped ") for record in caplog.records) == 1
    other = run_worker(build_recipe({**tree, "output_dir": str(tmp_path / "two")}))
    assert other.dataset_hash == first.dataset_hash


def test_images_without_caption_are_all_named_before_class_images_are_generated(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path)
    del tree["data"]["instance_prompt"]
    with pytest.raises(DataError, match=r"(?s)no caption.*such images: .*0\.png") as caught:
        assemble(build_recipe(tree), DistributedContext())
    assert str(caught.value).count(".png") > 2
    tree["data"]["caption_from_filename"] = True
    tree["method"] = {"name": "native"}
    for path in Path(tree["data"]["instance_data_dir"]).glob("*.png"):
        path.rename(path.with_name(f"0{path.stem}-a cat.png"))
    assert assemble(build_recipe(tree), DistributedContext()).feed.batch(0)["prompts"][0] == "a cat"


@pytest.mark.parametrize("images", ["10_sks toy", "img/10_sks toy"])
def test_kohya_subfolder_instead_of_its_parent_is_refused(
    tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, {f"{images}/IMG_1.png": None})
    recipe = tmp_path / "r.yaml"
    sections = (
        "method: {name: native}",
        f"data: {{train_data_dir: '{images}'}}",
        "train: {max_train_steps: 1}",
    )
    recipe.write_text("\n".join((*sections, "output_dir: out")))
    shown = run("train", recipe, "scaling.num_workers=0")
    assert shown.exit_code == 2 and f"Use its parent, {(tmp_path / images).parent}" in shown.stderr
    above = load_recipe(recipe, [f"data.train_data_dir={tmp_path}"])
    if "/" in images:  # the repeat folder is two levels below data.train_data_dir
        load_sets(above.data)
        assert "are not used" in caplog.text
    else:
        assert load_sets(above.data).concepts[0].repeats == 10


def test_long_captions_and_enlarged_images_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = tiny.make_recipe(tmp_path)
    folder = Path(tree["data"]["instance_data_dir"])
    first = sorted(folder.glob("*.png"))[0]
    first.with_suffix(".txt").write_text("cat " * 90)
    Image.new("RGB", (500, 1), "red").save(folder / "strip.png")
    assemble(build_recipe(tree), DistributedContext())
    long = [record.message for record in caplog.records if "tokens" in record.message]
    assert len(long) == 1 and "90" in long[0] and first.name in long[0]
    assert any("strip.png" in record.message and "enlarged" in record.message for record in caplog.records)


def test_class_images_ignore_caption_options(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path)
    fill(tmp_path / "class", {"c.png": None, "c.txt": "another cat, blue", "d.png": None})
    tree["method"] = {"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 2}
    tree["data"] |= {
        "class_data_dir": str(tmp_path / "class"),
        "class_prompt": "a cat",
        "caption_prefix": "sks",
    }
    tree["data"] |= {"shuffle_tags": True, "tag_dropout": 1.0, "use_captions": True}
    folder = Path(tree["data"]["instance_data_dir"])
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a cat, red")
    tree["data"]["keep_tokens"] = 1
    feed = assemble(build_recipe(tree), DistributedContext()).feed
    prompts = {prompt for step in range(4) for prompt in feed.batch(step)["prompts"]}
    assert prompts == {"sks a cat", "another cat, blue", "a cat"}
