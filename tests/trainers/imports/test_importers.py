"""Tests that hold for every importer: recognition, valid recipes, nothing dropped silently, no secrets copied."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest
import trainer_configs
from pydantic import BaseModel

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.recipe_keys import recipe_keys
from dreamfleet.trainers.imports.documents import parse_document
from dreamfleet.trainers.imports.importer import IMPORTERS, Importer, find_importer
from dreamfleet.trainers.imports.rules import Effect, Joined, Table, To
from dreamfleet.trainers.imports.settings import Document, Settings
from dreamfleet.trainers.imports.translate import Imported, import_files
from dreamfleet.trainers.recipe import Recipe, load_recipe

PROGRAMS = sorted(trainer_configs.CONFIGS)


def write(folder: Path, program: str) -> list[str]:
    """Write the config of a program into a folder, and return the first file, which names the others."""
    for name, text in trainer_configs.CONFIGS[program]:
        (folder / name).write_text(text)
    return [str(folder / trainer_configs.CONFIGS[program][0][0])]


def converted(folder: Path, program: str) -> Imported:
    return import_files(write(folder, program))


def documents(program: str) -> list[Document]:
    return [parse_document(text, name) for name, text in trainer_configs.CONFIGS[program]]


def test_every_built_in_importer_has_a_config() -> None:
    assert sorted(IMPORTERS.names()) == PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_config_is_recognised_and_the_recipe_loads(tmp_path: Path, program: str) -> None:
    found = converted(tmp_path, program)
    assert found.program == program
    path = tmp_path / "recipe.yaml"
    path.write_text(found.text)
    recipe = load_recipe(path)
    written = {line.key for line in found.lines}
    assert "train.max_train_steps" in written or "train.num_train_epochs" in written
    assert recipe.output_dir.endswith("cat") or recipe.output_dir.endswith("cat_v1")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_has_a_rule_or_is_reported(tmp_path: Path, program: str) -> None:
    importer = IMPORTERS.get(program)()
    found = converted(tmp_path, program)
    reported = {entry.key for entry in found.left}
    for key, items in importer.read(documents(program)).items():
        for item in items:
            assert importer.find_rule(key) is not None or item.where in reported, key


@pytest.mark.parametrize("program", PROGRAMS)
def test_unknown_setting_is_reported(program: str, tmp_path: Path) -> None:
    name, text = trainer_configs.CONFIGS[program][0]
    if name.endswith(".json"):
        text = json.dumps({**json.loads(text), "no_such_key": 3})
    elif name.endswith(".yaml"):
        text = text.replace("trigger_word: sks", "trigger_word: sks\n      no_such_key: 3")
    else:
        text = text.rstrip() + " --no_such_key=3\n"
    path = tmp_path / name
    path.write_text(text)
    entry = next(entry for entry in import_files([str(path)]).left if entry.key == "no_such_key")
    assert entry.effect is Effect.CHANGES and "unknown key" in entry.reason and str(entry.value) == "3"


@pytest.mark.parametrize("program", PROGRAMS)
def test_secrets_are_neither_copied_nor_shown(tmp_path: Path, program: str) -> None:
    found = converted(tmp_path, program)
    shown = found.text + "\n".join(found.report()) + json.dumps(found.to_json(), default=str)
    for secret in ("hf_abcdefghijklmnopqrstuvwx", "0123456789abcdef0123456789abcdef01234567"):
        assert secret not in shown


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_written_default_is_marked_and_differs_from_ours(tmp_path: Path, program: str) -> None:
    found = converted(tmp_path, program)
    for line in found.written_defaults:
        assert "their default" in found.text
        assert f"  {line.key}: " in "\n".join(found.report())


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_rule_names_a_key_of_the_recipe(program: str) -> None:
    keys: set[str] = set()
    for name in METHODS.names():
        sections: dict[str, type[BaseModel]] = {"method": METHODS.get(name)}
        keys |= {key.path for key in recipe_keys(Recipe, sections).values()}
    rules = {**IMPORTERS.get(program).rules, **IMPORTERS.get(program).patterns}
    targets = [key for rule in rules.values() for key in _targets(rule) if "." in key]
    assert {key for key in targets if key not in keys and key != "method.name"} <= PENDING


# Keys that the recipe does not have yet; settings with them are reported as left out.
PENDING: set[str] = set()


def _targets(rule: object) -> tuple[str, ...]:
    if isinstance(rule, To):
        return (rule.key,)
    return rule.keys if isinstance(rule, Joined) else ()


def test_config_of_an_unknown_program_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"epochs_of_us": 3, "images": "x", "rate": 1}')
    with pytest.raises(UserError, match=r"no config of a known trainer \(known: kohya, .*--from"):
        import_files([str(path)])


def test_installed_package_adds_an_importer(tmp_path: Path) -> None:
    class Toy(Importer):
        """Reads two settings."""

        name, title, version = "toy", "a toy trainer", "1"
        rules: ClassVar[Table] = {
            "toy_rate": To("optimizer.learning_rate"),
            "toy_steps": To("train.max_train_steps"),
        }
        markers = frozenset({"toy_rate"})

        def method(self, settings: Settings, documents: object) -> str:
            return "native"

    path = tmp_path / "toy.json"
    path.write_text('{"toy_rate": 1e-3, "toy_steps": "7"}')
    IMPORTERS.register("toy")(Toy)
    try:
        assert find_importer([parse_document(path.read_text(), str(path))]) is Toy
        found = import_files([str(path)])
    finally:
        IMPORTERS.unregister("toy")
    assert {line.key: line.value for line in found.lines}["train.max_train_steps"] == 7


def test_incomplete_importer_is_rejected() -> None:
    class Nameless(Importer):
        """Has no title."""

        name = "nameless"

    with pytest.raises(UserError, match="Nameless does not set title"):
        IMPORTERS.register("nameless")(copy.copy(Nameless))
