"""A recipe under translation: its lines with their sources, and the settings that have no counterpart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.recipe_keys import RecipeKey, recipe_keys
from dreamfleet.trainers.imports.paths import PathMap
from dreamfleet.trainers.imports.rules import Effect, Gone, Joined, Rule, Untranslatable, is_off, plain
from dreamfleet.trainers.imports.secrets import HIDDEN, REASON, is_secret
from dreamfleet.trainers.imports.settings import Setting
from dreamfleet.trainers.recipe import Recipe


@dataclass(frozen=True)
class Line:
    """One value of the recipe, the setting that it comes from, and the comment on a change of meaning.

    ``is_default``: whether it is a default of the other trainer, which differs from ours.
    """

    key: str
    value: Any
    source: str
    note: str = ""
    is_default: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A setting without a counterpart, the effect of leaving it out and the reason."""

    key: str
    value: Any
    effect: Effect
    reason: str


class Draft:
    """Collects the lines of a recipe for one method; programs call :meth:`put`, :meth:`leave` and :meth:`apply`."""

    def __init__(self, method: str, paths: PathMap):
        self.method, self.paths = method, paths
        sections: dict[str, type[BaseModel]] = {"method": METHODS.get(method)}
        self.keys: dict[str, RecipeKey] = recipe_keys(Recipe, sections)
        self.fields: dict[str, FieldInfo] = dict(_fields(Recipe, sections, ""))
        self.ours: dict[str, Any] = {
            path: field.default
            for path, field in self.fields.items()
            if field.default is not PydanticUndefined
        }
        self.lines: dict[str, Line] = {}
        self.left: list[LeftOut] = []
        self.conflicts: list[str] = []

    def apply(self, rule: Rule, name: str, setting: Setting, *, is_default: bool = False) -> None:
        """Translate one setting by its rule."""
        value = setting.value
        if isinstance(rule, Joined):
            return
        if isinstance(rule, Gone):
            if not is_default and not is_off(value, rule.off):
                self.leave(setting.where, value, rule.effect, rule.reason)
            return
        if is_off(value, rule.off) and not (value == [] and not rule.off):
            return
        try:
            converted = rule.convert(value)
        except Untranslatable as lost:
            if not is_default:
                self.leave(setting.where, value, lost.effect, lost.reason)
            return
        self.put(
            rule.key, converted, source=setting.where, note=rule.note, is_default=is_default, shown=value
        )

    def put(
        self,
        key: str,
        value: Any,
        *,
        source: str,
        note: str = "",
        is_default: bool = False,
        shown: Any = None,
    ) -> None:
        """Set a value of the recipe; one of our defaults, or a key that this method lacks, is not written.

        ``shown``: the value in reports if the key does not exist. Two settings that mean one key with different values
        are a conflict, which :meth:`check` raises.
        """
        found = self.keys.get(key)
        if found is None:
            if not is_default and value not in (False, 0, None):
                reason = f"the method {self.method} of this version has no {key}"
                self.leave(source, value if shown is None else shown, Effect.CHANGES, reason)
            return
        value = self._fitted(found, source, value)
        if (problem := _problem(self.fields[found.path], value)) is not None:
            if not is_default:
                reason = f"{found.path} cannot be {value!r} ({problem}); it stays {self.get(found.path)!r}"
                # A rate that suits one optimizer, such as Prodigy's 1, may ruin a training with another.
                effect = Effect.BLOCKS if found.path == "optimizer.name" else Effect.CHANGES
                self.leave(source, value if shown is None else shown, effect, reason)
            return
        before = self.lines.get(found.path)
        if is_default and (before is not None or value == self.ours.get(found.path)):
            return
        if before is not None and not before.is_default and before.value != value:
            self.conflicts.append(
                f"{before.source}: {before.value!r} and {source}: {value!r} both mean {found.path}; keep one"
            )
        self.lines[found.path] = Line(found.path, value, source, note, is_default)

    def drop(self, key: str) -> None:
        """Remove a value of the recipe, if it is there."""
        self.lines.pop(key, None)

    def replace(self, key: str, value: Any, *, source: str, note: str = "", is_default: bool = False) -> None:
        """Set a value in place of one that is there already."""
        self.lines.pop(key, None)
        self.put(key, value, source=source, note=note, is_default=is_default)

    def leave(self, key: str, value: Any, effect: Effect, reason: str) -> None:
        """Report a setting without a counterpart."""
        if is_secret(key, value):
            value, effect, reason = HIDDEN, Effect.IGNORED, REASON
        entry = LeftOut(key, value, effect, reason)
        if entry not in self.left:
            self.left.append(entry)

    def get(self, key: str) -> Any:
        """Return a value of the recipe: the written one, else our default."""
        return self.lines[key].value if key in self.lines else self.ours.get(key)

    def check(self) -> None:
        """Raise UserError naming all pairs of settings that contradict each other."""
        if self.conflicts:
            raise UserError("contradictory settings:\n  " + "\n  ".join(dict.fromkeys(self.conflicts)))

    def tree(self) -> dict[str, Any]:
        """Return the recipe as nested mappings."""
        tree: dict[str, Any] = {}
        for line in self.lines.values():
            section, _, name = line.key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = line.value
        return tree

    def _fitted(self, key: RecipeKey, source: str, value: Any) -> Any:
        """Return a value with the type of its key, and a path mapped."""
        if isinstance(value, str) and not key.is_text:
            value = plain(value)
        elif key.is_text and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(key.path_field, PathField) and isinstance(value, str):
            return self._path(key.path_field, source, value)
        return value

    def _path(self, field: PathField, source: str, value: str) -> str:
        if value in field.names:
            return value
        if field.is_output:
            return self.paths.output(value)
        if field.hub or field.kind == "model":
            return self.paths.model(source, value)
        return self.paths.image_folder(source, value)


def _fields(
    model: type[BaseModel], sections: dict[str, type[BaseModel]], prefix: str
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the full key and the field of every value of a recipe."""
    for name, field in model.model_fields.items():
        path = prefix + name
        section = sections.get(path) or field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _fields(section, sections, f"{path}.")
        else:
            yield path, field


def _problem(field: FieldInfo, value: Any) -> str | None:
    """Return why a value is invalid for a field, None if it is valid."""
    annotation: Any = field.annotation
    for item in field.metadata:
        annotation = Annotated[annotation, item]
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return None
