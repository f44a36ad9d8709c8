"""Translates the config of another trainer into a recipe: ``dreamfleet config --import FILE``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.imports.documents import read_document
from dreamfleet.trainers.imports.draft import Draft, LeftOut, Line
from dreamfleet.trainers.imports.image_sets import PLACEHOLDER
from dreamfleet.trainers.imports.importer import Importer, find_importer
from dreamfleet.trainers.imports.lora_type import fit_lora_type
from dreamfleet.trainers.imports.paths import PathMap, read_pairs
from dreamfleet.trainers.imports.rules import Effect
from dreamfleet.trainers.imports.settings import Document, Settings
from dreamfleet.trainers.imports.write import recipe_text, report_lines
from dreamfleet.trainers.recipe import validate_recipe

PLACES = ("data.instance_data_dir", "data.train_data_dir", "data.concepts_list", "data.sets")


@dataclass(frozen=True)
class Imported:
    """A translated recipe: its YAML, its lines, what was left out, the paths that do not exist here."""

    program: str
    title: str
    text: str
    lines: tuple[Line, ...]
    left: tuple[LeftOut, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def blocking(self) -> list[LeftOut]:
        """The settings without which the training cannot run as it was."""
        return [entry for entry in self.left if entry.effect is Effect.BLOCKS]

    @property
    def written_defaults(self) -> list[Line]:
        """The other trainer's defaults that differ from ours."""
        return [line for line in self.lines if line.is_default]

    def report(self) -> list[str]:
        """Return the lines of the report on what was left out, written out, and not found."""
        return report_lines(self.title, self.left, self.written_defaults, self.missing)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "program": self.program,
            "lines": [vars(line) for line in self.lines],
            "left_out": [vars(entry) for entry in self.left],
            "missing_paths": dict(self.missing),
        }


def import_files(files: Sequence[str], *, maps: Sequence[str] = (), program: str | None = None) -> Imported:
    """Translate files that are together one config of another trainer.

    ``maps``: ``OLD=NEW`` beginnings of paths; ``program``: the name of the importer, else it is recognised. Raises
    UserError for files of no known program, for contradictory settings, and for a method that does not exist here.
    """
    documents = [read_document(file) for file in files]
    return import_documents(documents, maps=maps, program=program)


def import_documents(
    documents: Sequence[Document], *, maps: Sequence[str] = (), program: str | None = None
) -> Imported:
    """Translate parsed files as :func:`import_files` does."""
    _refuse_recipe(documents)
    importer = find_importer(documents, program)()
    folders = list(
        dict.fromkeys([*(os.path.dirname(os.path.abspath(each.path)) for each in documents), os.getcwd()])
    )
    pairs = read_pairs(maps)
    paths = PathMap(pairs=pairs, folders=folders)
    settings = importer.read(documents)
    _read_named_files(importer, settings, documents, paths)
    draft = Draft(importer.method(settings, documents), paths)
    draft.put("method.name", draft.method, source="")
    importer.translate(settings, draft)
    fit_lora_type(draft)
    _complete(draft, documents[0])
    _validate(draft, importer)
    if unused := [old for old, _ in pairs if old not in paths.used]:
        raise UserError(f"--map {unused[0]}=...: no path in the config begins with {unused[0]!r}")
    return _imported(importer, draft, documents)


def _read_named_files(
    importer: Importer, settings: Settings, documents: Sequence[Document], paths: PathMap
) -> None:
    """Add the settings in the files that a config names, such as kohya's dataset config."""
    given = {os.path.abspath(document.path) for document in documents}
    for key in importer.named_files:
        path = settings.get(key)
        if isinstance(path, str) and path:
            found = paths.image_folder(key, path)
            if os.path.isfile(found) and os.path.abspath(found) not in given:
                settings.merge(importer.read([replace(read_document(found), role=key)]))


def _refuse_recipe(documents: Sequence[Document]) -> None:
    for document in documents:
        tree = document.content
        if isinstance(tree, dict) and isinstance(tree.get("method"), dict) and "output_dir" in tree:
            raise UserError(f"{document.path} is a dreamfleet recipe already; leave --import out")


def _complete(draft: Draft, document: Document) -> None:
    """Add what every recipe needs and the config lacks: images, an output folder and a length."""
    if not any(place in draft.lines for place in PLACES):
        draft.put("data.instance_data_dir", PLACEHOLDER, source="", note="the config names no images")
        draft.paths.missing.pop("", None)
        draft.leave(
            "(images)",
            None,
            Effect.BLOCKS,
            "the config names no folder of images: set data.instance_data_dir",
        )
    if "model.pretrained_model_name_or_path" not in draft.lines:
        reason = "the config names no model: set model.pretrained_model_name_or_path; by default it is the pocket model"
        draft.leave("(model)", None, Effect.BLOCKS, reason)
    weight = draft.lines.get("train.snr_gamma")
    if weight is not None and draft.get("model.prediction_type") == "v_prediction":
        note = "min(SNR, gamma) / (SNR + 1) for v-prediction, as there"
        draft.replace(weight.key, weight.value, source=weight.source, note=note, is_default=weight.is_default)
    if "output_dir" not in draft.lines:
        name = os.path.splitext(os.path.basename(document.path))[0].strip(" #-") or "imported"
        draft.put("output_dir", f"runs/{name.replace(' ', '-')}", source="", note="the config names none")
    if not {"train.max_train_steps", "train.num_train_epochs"} & set(draft.lines):
        draft.leave(
            "(length)",
            None,
            Effect.BLOCKS,
            "the config sets no length: set train.max_train_steps or num_train_epochs",
        )


def _validate(draft: Draft, importer: Importer) -> None:
    _, errors = validate_recipe(draft.tree())
    if errors:
        raise UserError(f"the settings of {importer.title} give no valid recipe:\n  " + "\n  ".join(errors))


def _imported(importer: Importer, draft: Draft, documents: Sequence[Document]) -> Imported:
    lines, left = tuple(draft.lines.values()), tuple(draft.left)
    missing = tuple(sorted(draft.paths.missing.items()))
    defaults = [line for line in lines if line.is_default]
    names = ", ".join(os.path.basename(document.path) for document in documents)
    head = [f"Imported by `dreamfleet config --import` from {names}, a config of {importer.title}."]
    head += report_lines(importer.title, left, defaults, missing)
    return Imported(importer.name, importer.title, recipe_text(lines, head), lines, left, missing)
