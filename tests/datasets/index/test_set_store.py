"""Test sets in recipes, their weights, filters and stored tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import image, put
from PIL import Image
from pydantic import ValidationError

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.set_store import open_set, open_sets
from dreamfleet.datasets.index.set_table import Counts
from dreamfleet.datasets.index.sets import load_sets


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))


def photo(seed: int, size: tuple[int, int] = (96, 64), quality: int = 95) -> bytes:
    """Return a smooth image, whose perceptual hash survives compression and scaling."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    smooth = Image.fromarray(cells).resize((96, 64), Image.Resampling.BICUBIC)
    smooth.resize(size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def folder(place: Path, count: int, *, first: int = 0) -> str:
    for seed in range(first, first + count):
        put(place, f"{seed}.jpg", photo(seed))
        put(place, f"{seed}.txt", f"a cat, number {seed}" if seed % 2 else "a dog")
    return str(place)


def config(*sets: dict[str, Any], **more: Any) -> DataConfig:
    return DataConfig.model_validate({"sets": list(sets), **more})


def test_a_set_is_the_long_form_of_the_short_keys(tmp_path: Path) -> None:
    place = folder(tmp_path / "cats", 3)
    short = DataConfig.model_validate({"instance_data_dir": place, "instance_prompt": "a cat", "repeats": 2})
    long = config({"source": place, "prompt": "a cat", "repeats": 2})
    assert load_sets(short).instances.content_hash == load_sets(long).instances.content_hash
    assert load_concepts(long)[0].instance_prompt == "a cat"


def test_weights_set_the_shares_of_an_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = config(
        {"source": folder(tmp_path / "a", 2), "prompt": "a", "weight": 3},
        {"source": folder(tmp_path / "b", 5, first=10), "prompt": "b", "weight": 1},
    )
    index = load_sets(data).instances
    concepts, uses = index.column("concept"), index.uses()
    shares = [sum(use for one, use in zip(concepts, uses, strict=True) if one == number) for number in (0, 1)]
    assert shares[0] == pytest.approx(3 * shares[1])
    assert min(uses) == pytest.approx(1) and "data.repeats" not in caplog.text
    again = load_sets(data.model_copy(update={"repeats": 3})).instances
    assert again.uses().tolist() == uses.tolist() and "data.repeats 3 has no effect" in caplog.text


def test_class_images_belong_to_the_sets_whose_prompt_ends_in_theirs(tmp_path: Path) -> None:
    dog, cat = str(tmp_path / "dogs"), str(tmp_path / "cats")
    data = config(
        {"source": "/x/a", "prompt": "sks dog"},
        {"source": "/x/b", "prompt": "zwx cat"},
        {"source": dog, "prompt": "dog", "is_reg": True},
        {"source": cat, "prompt": "cat", "is_reg": True},
    )
    found = [(one.class_data_dir, one.class_prompt) for one in load_concepts(data)]
    assert found == [(dog, "dog"), (cat, "cat")]
    with pytest.raises(DataError, match="match no set"):
        load_concepts(
            config(
                {"source": "/x/a", "prompt": "sks dog"},
                {"source": dog, "prompt": "dog", "is_reg": True},
                {"source": cat, "prompt": "cat", "is_reg": True},
            )
        )


def test_a_set_has_caption_options_of_its_own(tmp_path: Path) -> None:
    data = config({"source": "/x/a", "shuffle_caption": True, "caption_prefix": "x"}, keep_tokens=2)
    own = data.for_set(load_concepts(data)[0])
    assert (own.shuffle_tags, own.caption_prefix, own.keep_tokens) == (True, "x", 2)
    assert (data.shuffle_tags, data.caption_prefix) == (False, "")


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        ([{"source": "a", "weight": 1}, {"source": "b"}], "weight"),
        ([{"source": "a", "weight": 1, "repeats": 2}], "both weight and repeats"),
        ([{"source": "a", "prompt": "x", "is_reg": True}], "every entry"),
        ([{"source": "a", "is_reg": True}], "without prompt"),
        ([{"source": "a", "class_source": "b"}], "class_prompt"),
        ([{"source": "a", "where": "aspect <"}], "expected"),
        ([], "empty"),
    ],
)
def test_contradictory_sets_are_refused(sets: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(*sets)


def test_a_condition_is_checked_in_every_section_that_has_one() -> None:
    for section in (
        {"instance_data_dir": "/x", "where": "aspect <"},
        {"concepts_list": [{"instance_data_dir": "/x", "where": "aspect <"}]},
    ):
        with pytest.raises(ValidationError, match=r"where\n.*expected a column"):
            DataConfig.model_validate(section)


def test_counts_add_up_and_every_bad_image_is_in_the_errors(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", 6)
    put(tmp_path / "set", "copy.jpg", photo(0))
    put(tmp_path / "set", "broken.jpg", b"no image")
    put(tmp_path / "set", "small.png", image(9, size=(8, 8)))
    data = DataConfig.model_validate(
        {
            "instance_data_dir": place,
            "where": "not tags has 'number 3'",
            "min_size": 32,
            "duplicates": "exact",
        }
    )
    opened = open_set(place, data)
    assert opened.counts == Counts(seen=9, used=5, bad=1, excluded=3)
    rules = {Path(uri).name: rule for uri, rule in zip(*opened.excluded.to_pydict().values(), strict=True)}
    assert rules["3.jpg"].startswith("where") and rules["small.png"] == "min_size: 32"
    assert rules["copy.jpg"].endswith("/0.jpg")
    stored = pq.read_table(opened.folder.path("errors.parquet")).to_pylist()
    assert [Path(row["uri"]).name for row in stored] == ["broken.jpg"]
    index = load_sets(data).instances
    assert len(index) == 5 and sum(one.files for one in index.excluded) == 3
    with pytest.raises(DataError, match="max_bad_fraction"):
        load_sets(data.model_copy(update={"max_bad_fraction": 0.1}))
    with pytest.raises(DataError, match=r"filters exclude 8 of 9"):
        load_sets(data.model_copy(update={"where": "width > 1000"}))


def test_near_duplicates_keep_the_largest(tmp_path: Path) -> None:
    put(tmp_path / "set", "large.jpg", photo(1, size=(192, 128)))
    put(tmp_path / "set", "a-small.jpg", photo(1, size=(96, 64), quality=60))
    put(tmp_path / "set", "other.jpg", photo(2))
    data = DataConfig.model_validate({"instance_data_dir": str(tmp_path / "set"), "duplicates": "near"})
    used = {Path(uri).name for uri in load_sets(data).instances.column("uri")}
    assert used == {"large.jpg", "other.jpg"}
    exact = data.model_copy(update={"duplicates": "exact"})
    assert len(load_sets(exact).instances) == 3


def test_columns_of_other_commands_are_joined_and_filter(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", 4)
    opened = open_set(place)
    hashes = opened.table.column("sha256").to_pylist()
    scores = {digest: float(number) for number, digest in enumerate(hashes[:3])}
    opened.write_columns("scores", pa.table({"sha256": list(scores), "aesthetic": list(scores.values())}))
    data = DataConfig.model_validate({"instance_data_dir": place, "where": "aesthetic >= 1"})
    assert set(load_sets(data).instances.column("sha256")) == set(hashes[1:3])
    assert open_set(place, data).table.column("aesthetic").to_pylist() == [1.0, 2.0]


def test_an_unknown_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    data = DataConfig.model_validate({"instance_data_dir": folder(tmp_path / "s", 2), "where": "aspekt < 2"})
    with pytest.raises(DataError, match="did you mean 'aspect'"):
        load_sets(data)
    with pytest.raises(DataError, match="same type"):
        load_sets(data.model_copy(update={"where": "caption < 2"}))


def test_opening_again_reads_only_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from dreamfleet.datasets.index import facts

    place = folder(tmp_path / "set", 4)
    for path in (tmp_path / "set").iterdir():
        os.utime(path, (1_000_000, 1_000_000))
    first = open_set(place, verify=False, phash=True)
    reads: list[str] = []
    original = facts.read_image_file
    monkeypatch.setattr(facts, "read_image_file", lambda uri: reads.append(uri) or original(uri))
    again = open_set(place, verify=False, phash=True)
    assert reads == [] and again.table.equals(first.table)
    path = put(tmp_path / "set", "2.jpg", photo(20))
    os.utime(path, (1_000_001, 1_000_001))
    changed = open_set(place, verify=False, phash=True)
    assert [Path(uri).name for uri in reads] == ["2.jpg"]
    assert changed.table.column("sha256").to_pylist() != first.table.column("sha256").to_pylist()
    assert pq.read_table(changed.address).num_rows == 4


def test_sets_of_a_recipe_are_opened_one_by_one(tmp_path: Path) -> None:
    data = config(
        {"source": folder(tmp_path / "a", 2), "prompt": "a", "where": "tags has 'a dog'"},
        {"source": folder(tmp_path / "b", 3, first=10)},
    )
    assert [opened.counts.used for opened in open_sets(data)] == [1, 3]
