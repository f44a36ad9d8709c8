"""Tests of prompts with options, in recipes and files: parsing, errors with line numbers, preview sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.prompt_lines import parse_prompt_line, read_prompts
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.evaluation.previews import check_previews, generate_previews
from dreamfleet.trainers.models.sampling.sample import image_grid
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.trainers.report.preview_grid import read_preview_grids
from dreamfleet.trainers.run.build import assemble


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    tiny.make_images(folder / "pictures", 3)
    tiny.make_recipe(folder)
    return folder


def test_options_equal_those_of_kohya() -> None:
    usual = ImageRequest("", negative_prompt="bad", seed=5, width=64)
    line = "a (cat:1.3) -- really --n ugly, bad --w 96 --h 128 --d 7 --s 30 --l 7.5 --ss k_euler_a"
    assert parse_prompt_line(line, usual) == ImageRequest(
        "a (cat:1.3) -- really", "ugly, bad", 7, 30, 7.5, "euler_a", width=96, height=128
    )
    assert parse_prompt_line("a cat", usual) == ImageRequest("a cat", "bad", 5, width=64)
    assert parse_prompt_line("--n ugly", usual).prompt == ""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("a --x 3", "--x"),
        ("a --w wide", "--w wide"),
        ("a --w", "--w"),
        ("a --s 0", "--s 0"),
        ("a --ss plms", "plms"),
        *[("a --l -3", "--l -3"), ("a --d 1e3", "--d 1e3"), ("a --h ³", "--h")],
    ],
)
def test_invalid_options_are_named(line: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_prompt_line(line, ImageRequest(""))


def test_a_file_is_replaced_by_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_bytes("\ufeff# no\n a cat --w 64 \n\n猫\n".encode())
    assert read_prompts(["x", "a b.txt"], folder=str(tmp_path)) == ["x", "a cat --w 64", "猫"]
    (tmp_path / "bad.txt").write_text("fine\na --w x\n# no\na --q 1\n")
    with pytest.raises(RecipeError, match=r"(?s)prompt 1: .*--z.*bad.txt, line 2: .*bad.txt, line 4: "):
        read_prompts(["a --z 1", "bad.txt"], folder=str(tmp_path))
    (tmp_path / "empty.txt").write_text("# no\n")
    for name, words in (("none.txt", "none.txt"), ("empty.txt", "no prompt")):
        with pytest.raises(RecipeError, match=words):
            read_prompts([name], folder=str(tmp_path))


def test_a_recipe_includes_the_prompts_of_a_file(workplace: Path) -> None:
    (workplace / "prompts.txt").write_text("a <x> --w 64\na dog\n")
    tree = tiny.make_recipe(workplace, validation={"prompts": "prompts.txt"})
    recipe = load_recipe(tiny.write_recipe(workplace / "recipe.yaml", tree))
    assert recipe.validation.prompts == ["a <x> --w 64", "a dog"]
    assert build_recipe(recipe.model_dump(mode="json")) == recipe  # as in jobs and run folders
    (workplace / "prompts.txt").write_text("a --w x\n")
    with pytest.raises(RecipeError, match=r"validation\.prompts:\n.*line 1"):
        load_recipe(workplace / "recipe.yaml")


def make(workplace: Path, **changes: Any) -> Any:
    recipe = build_recipe(tiny.make_recipe(workplace, **changes))
    return recipe, assemble(recipe, DistributedContext())


def test_previews_of_different_sizes(workplace: Path, tmp_path: Path) -> None:
    prompts = ["a cat --w 64 --h 32 --d 3", "[a|b] (cat:1.2) --n x"]
    recipe, parts = make(
        workplace, validation={"prompts": prompts, "num_images": 2, "num_inference_steps": 1}
    )
    images, cells = generate_previews(parts.method, parts.engine, recipe.validation, 32)
    assert [image.size for image in images] == [(64, 32)] * 2 + [(32, 32)] * 2
    assert [(cell["prompt"], cell["seed"]) for cell in cells] == [
        ("a cat", 3),
        ("a cat", 4),
        ("[a|b] (cat:1.2)", 0),
        ("[a|b] (cat:1.2)", 1),
    ]
    run = Storage(tmp_path)
    (tmp_path / "samples").mkdir()
    image_grid(images, 2).save(tmp_path / "samples" / "step-000001.png")
    run.write_text("samples/step-000001.jsonl", "\n".join(json.dumps(cell) for cell in cells))
    (grid,) = read_preview_grids(run, 9)
    assert [cell.image.tobytes() for cell in grid.cells] == [image.tobytes() for image in images]
    wide = recipe.validation.model_copy(update={"prompts": ["fine", "a cat --w 41"]})
    with pytest.raises(RecipeError, match=r"prompt 2 .*multiple of"):
        check_previews(parts.method, wide, 32)


@pytest.mark.parametrize("name", ["textual_inversion", "prompt_tuning"])
@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("[name]的照片", "sks"),
        ("many [name]s", "sks"),
        ("x[name]y", "sks"),
        ("a [name]", "小猫"),
        ("一只[name]的", "小猫"),
        ("a photo of SKS", "sks"),
        ("{}2", "Sks"),
        ("a [name]", "[V]"),
        ("x[name]", "<x>"),
        ("a café", "cafe\u0301"),
    ],
)
def test_a_placeholder_trains_at_any_position_of_the_template(
    workplace: Path, name: str, template: str, word: str
) -> None:
    parts = templated(workplace, name, [template], word)
    loss = parts.method(parts.prepare(parts.feed.batch(0)))
    loss.total.backward()
    for param in parts.engine.params.values():
        assert param.grad is not None and param.grad.abs().sum() > 0


def templated(workplace: Path, name: str, templates: list[str], word: str = "sks", **changes: Any) -> Any:
    (workplace / "templates.txt").write_text("\n".join(templates))
    method = {"name": name, "placeholder_token": word, "initializer_token": "cat"}
    method["template_file"] = str(workplace / "templates.txt")
    return make(workplace, method=method, **changes)[1]


@pytest.mark.parametrize("name", ["textual_inversion", "prompt_tuning"])
def test_templates_without_the_placeholder_are_refused(
    workplace: Path, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cats = tiny.make_images(tmp_path / "cats", 2, captions=True)
    for templates in (["a photo"], ["a sksa"], ["[filewords]", "a cat"]):
        with pytest.raises(RecipeError, match="no template uses 'sks'"):
            templated(workplace, name, templates, data__instance_data_dir=str(cats))
    templated(workplace, name, ["a photo", "a [name]", "cat"])
    assert "2 of 3 templates do not use 'sks'" in caplog.text
    images = tiny.make_images(tmp_path / "captioned", 3)
    for number, image in enumerate(sorted(images.glob("*.png"))):
        image.with_suffix(".txt").write_text(["a cat", "my SKS toy", "the [name]"][number])
    templated(workplace, name, ["[filewords]"], data__instance_data_dir=str(images))
    assert "1 of 3 captions do not use 'sks'" in caplog.text


@pytest.mark.parametrize("prompt", ["a photo of [name]", "a {} cat"])
def test_methods_without_a_placeholder_refuse_templates_with_one(workplace: Path, prompt: str) -> None:
    with pytest.raises(RecipeError, match="no placeholder token"):
        make(workplace, data__instance_prompt=prompt)
