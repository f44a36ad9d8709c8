"""Test reading tables of subjects in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.tune.fleet.table import Table, read_table

ROWS: list[dict[str, Any]] = [
    {"name": "cat", "images": ["a.png", "b.png"], "train.seed": 1},
    {"name": "dog", "images": "dogs", "train.seed": None},
]


def rows_of(table: Table) -> list[dict[str, Any]]:
    names = list(table.columns)
    return [dict(zip(names, cells, strict=True)) for cells in zip(*table.columns.values(), strict=True)]


def test_jsonl_yaml_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    lines = '{"name": "cat", "images": ["a.png", "b.png"], "train": {"seed": 1}}\n\n{"name": "dog", "images": "dogs"}\n'
    (tmp_path / "s.jsonl").write_text(lines)
    (tmp_path / "s.yaml").write_text(
        "cat: {images: [a.png, b.png], train: {seed: 1}}\ndog: {images: dogs, train.seed: null}\n"
    )
    table = read_table(str(tmp_path / "s.jsonl"))
    assert rows_of(table) == ROWS
    assert list(table.numbers) == [1, 3]
    assert table.folder == str(tmp_path)
    assert rows_of(read_table(str(tmp_path / "s.yaml"))) == ROWS
    columns = {"name": ["cat", "dog"], "train.seed": [1, None]}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    assert dict(read_table(str(tmp_path / "s.parquet")).columns) == columns


def test_csv_cells_are_text_and_rows_have_the_numbers_of_a_spreadsheet(tmp_path: Path) -> None:
    text = '\ufeffname,images,prompt\n007,a,"one,\ntwo"\n\nshort\nlast,b,\n'
    (tmp_path / "s.csv").write_text(text, encoding="utf-8")
    table = read_table(str(tmp_path / "s.csv"))
    assert table.columns["name"] == ["007", "last"]
    assert table.columns["prompt"][0] == "one,\ntwo"
    assert list(table.numbers) == [2, 5]
    assert table.errors == ["row 4: 1 cell, and the header has 3; end the row with ',' for each empty cell"]


def test_a_row_with_too_many_cells_names_the_quotes(tmp_path: Path) -> None:
    (tmp_path / "s.tsv").write_text("name\timages\na\tb\tc\n")
    error = "row 2: 3 cells, and the header has 2; put text with a tab in quotes"
    assert read_table(str(tmp_path / "s.tsv")).errors == [error]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("s.txt", "x", "ending"),
        ("s.csv", "name,name\na,b\n", "twice"),
        ("s.yaml", "3", "list of subjects"),
        ("s.yaml", "{", "not YAML"),
        ("s.parquet", "PAR", "Parquet"),
    ],
)
def test_an_unreadable_table_is_one_error(tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=part):
        read_table(str(tmp_path / name))


def test_lines_that_are_no_objects_are_reported_with_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"name": "a"}\n[1]\n{"name":\n')
    found = read_table(str(tmp_path / "s.jsonl")).errors
    assert [line.partition(":")[0] for line in found] == ["row 2", "row 3"]
