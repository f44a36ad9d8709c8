"""Test tables of subjects against a recipe: values, and all errors together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.fleet import check_values
from dreamfleet.tune.fleet.read_subjects import read_subjects
from dreamfleet.tune.fleet.subjects import Subjects
from dreamfleet.tune.fleet.table import read_table


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tree = tiny.make_recipe(tmp_path, output_dir=str(tmp_path / "fleet"))
    tiny.make_images(tmp_path / "cat", 2)
    tiny.make_images(tmp_path / "dog", 2)
    return build_recipe(tree)


def read(folder: Path, recipe: Recipe, text: str, **options: Any) -> Subjects:
    (folder / "s.csv").write_text(text)
    return read_subjects(read_table(str(folder / "s.csv")), recipe, **options)[0]


def errors_of(folder: Path, recipe: Recipe, text: str, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, recipe, text, **options)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_rows_change_the_recipe_and_empty_cells_do_not(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "s.csv").write_text(
        "name,instance_data_dir,instance_prompt,train.batch_size,priority,validation.prompts\n"
        "c,cat,a sks cat,2,,\n"
        'd,"[dog/00.png, cat/01.png]",,,7,"[one, two]"\n'
    )
    subjects, recipes = read_subjects(read_table(str(tmp_path / "s.csv")), recipe, looks=False)
    assert subjects.order() == [1, 0]
    cat, dog = (build_recipe(recipes.task_tree(subject)) for subject in subjects)
    assert cat.data.instance_data_dir == str(tmp_path / "cat")
    assert cat.data.instance_prompt == "a sks cat"
    assert (cat.train.train_batch_size, cat.output_dir) == (2, str(tmp_path / "fleet/subjects/c"))
    assert dog.data.instance_data_dir == f'list://["{tmp_path}/dog/00.png", "{tmp_path}/cat/01.png"]'
    assert dog.data.instance_prompt == recipe.data.instance_prompt
    assert dog.train == recipe.train
    assert dog.validation.prompts == ["one", "two"]


def test_all_errors_are_reported_together_with_their_rows(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "empty").mkdir()
    found = errors_of(
        tmp_path,
        recipe,
        "name,images,train.max_train_steps,priority\n"
        "a,cat,3,\nA,cat,three,high\n../x,nothing,three,\n,empty,,\n"
        'con,[],0,\nb,"[cat/00.png, cat/nine.png]",,\nb,cat,,\n',
    )
    for row, part in [
        (3, "same folder as 'a'"),
        (3, "'high' is not a number"),
        (4, "path separator"),
        (4, "nothing does not exist"),
        (5, "empty"),
        (5, "holds no image"),
        (6, "reserved"),
        (6, "neither a folder nor a list"),
        (6, "train.max_train_steps"),
        (7, "nine.png does not exist"),
        (8, "the same, in row 7"),
    ]:
        assert any(f"row {row}: " in line and part in line for line in found), (row, part, found)
    assert any(line.startswith("rows 3, 4: train.max_train_steps") for line in found)
    assert len(found) == 12


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("promt", "did you mean 'prompt'"),
        ("train.max_train_step", "did you mean 'train.max_train_steps'"),
        ("max_train_steps", "write train.max_train_steps"),
        ("scaling.num_workers", "whole fleet"),
        ("output_dir", "subjects/NAME"),
        ("data.train_data_dir", "in the column images"),
        ("image_dir", "mean the same"),
    ],
)
def test_wrong_columns_name_the_remedy(tmp_path: Path, recipe: Recipe, header: str, part: str) -> None:
    assert part in errors_of(tmp_path, recipe, f"name,images,{header}\na,cat,x\n")[0]


def test_images_and_class_prompts_are_needed(tmp_path: Path, recipe: Recipe) -> None:
    assert "no column images" in errors_of(tmp_path, recipe, "name\na\n", has_images=False)[0]
    assert "row 3: " in errors_of(tmp_path, recipe, "name,images\na,cat\nb,\n", has_images=False)[0]
    assert read(tmp_path, recipe, "name\na\n", has_images=True)[0].values == {}
    tree = recipe.model_dump(mode="json")
    tree["method"]["with_prior_preservation"] = True
    tree["data"]["class_prompt"] = None
    prior = build_recipe(tree)
    found = errors_of(tmp_path, prior, "name,images,class_prompt\na,cat,a cat\nb,cat,\n")
    assert "row 3: class_prompt" in found[0]


def test_columns_of_many_values_are_validated_alone(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_values, "MANY", 3)
    calls: list[Any] = []
    whole = check_values.validate_recipe

    def validate(tree: Any) -> Any:
        calls.append(tree)
        return whole(tree)

    monkeypatch.setattr(check_values, "validate_recipe", validate)
    rows = "".join(f"s{number},cat,{number},{number % 2}\n" for number in range(20))
    found = errors_of(tmp_path, recipe, f"name,images,train.seed,train.noise_offset\n{rows}x,cat,-1,0\n")
    assert len(found) == 1 and found[0].startswith("row 22: train.seed")
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["a\u202eb", "a\nb", "a:b", " a", "a.", ".a", "NUL.txt", "ä" * 61, "a\\b"])
def test_unsafe_names_are_refused(tmp_path: Path, recipe: Recipe, name: str) -> None:
    quoted = '"' + name + '"'
    assert "row 2" in errors_of(tmp_path, recipe, f"name,images\n{quoted},cat\n")[0]


def test_equal_rows_have_equal_digests(tmp_path: Path, recipe: Recipe) -> None:
    one = read(tmp_path, recipe, "name,images,train.seed,priority\na,cat,3,1\n")
    two = read(tmp_path, recipe, "name,train.seed,method.name,images\na,3,,cat\n")
    three = read(tmp_path, recipe, "name,train.seed,images\na,4,cat\n")
    assert one[0].digest == two[0].digest != three[0].digest


def test_wrong_columns_do_not_hide_wrong_values(tmp_path: Path, recipe: Recipe) -> None:
    found = errors_of(tmp_path, recipe, "name,images,promt,train.seed\na,cat,x,-1\n")
    assert len(found) == 2 and "column 'promt'" in found[0] and found[1].startswith("row 2: train.seed")


def test_a_folder_in_a_list_of_images_is_called_a_folder(tmp_path: Path, recipe: Recipe) -> None:
    found = errors_of(tmp_path, recipe, 'name,images\na,"[cat/00.png, dog]"\n')
    assert len(found) == 1 and f"{tmp_path}/dog is a folder" in found[0]
