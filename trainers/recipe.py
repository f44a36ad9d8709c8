"""The recipe: one YAML file for each run. Composes the sections and reports all errors together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
)

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.config_base import Section, as_list
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.index import exclusions
from dreamfleet.datasets.path_field import NamedPath, PathField, list_paths, resolve_paths
from dreamfleet.datasets.registry import EntryName
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.conflicts import find_conflicts
from dreamfleet.trainers.config.deepspeed import merge_deepspeed_file
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import find_refused
from dreamfleet.trainers.config.fleet import FleetConfig
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.config.metrics import HELD_OUT
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.prompt_lines import read_prompts
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.config.search import SearchConfig
from dreamfleet.trainers.config.search_check import find_search_errors
from dreamfleet.trainers.config.storage import StorageConfig
from dreamfleet.trainers.config.tracking import TRACKERS, TrackingConfig
from dreamfleet.trainers.config.train import TrainConfig
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.config.validation_errors import explain, keys_at, nearest


class Recipe(Section):
    """One run: its method, model, data, training options, engine, workers and output folder."""

    method: SerializeAsAny[MethodConfig]
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    scaling: ScalingConfig = ScalingConfig()
    storage: StorageConfig = StorageConfig()
    search: SearchConfig | None = Field(None, description="for `dreamfleet tune`")
    fleet: FleetConfig | None = Field(None, description="for `dreamfleet fleet`")
    output_dir: Annotated[str, PathField("folder", must_exist=False, is_output=True)] = Field(
        min_length=1, description="folder or s3:// URL; its last part is the name of the artifacts"
    )
    report_to: Annotated[
        list[Annotated[str, AfterValidator(EntryName(TRACKERS))]], BeforeValidator(as_list)
    ] = Field(["tensorboard"], validation_alias=AliasChoices("report_to", "log_with"))
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_name(self) -> str:
        """The run's name: the last part of ``output_dir``."""
        return self.output_dir.rstrip("/").rpartition("/")[2]

    @property
    def keeps_average(self) -> bool:
        """Whether averaged weights are evaluated and exported: EMA weights, or the optimizer's own average."""
        return self.engine.use_ema or self.optimizer.kind.average is not None

    @property
    def excluded_folders(self) -> dict[str, str]:
        """Descriptions of the folders with images that the run does not train on, by folder."""
        folders = {self.output_dir: "the run's output_dir"}
        return folders | ({self.validation.holdout: exclusions.HELD_OUT} if self.validation.holdout else {})

    @property
    def paths(self) -> list[NamedPath]:
        """The absolute paths and URLs that the run reads, with their keys."""
        return [named for named in list_paths(self) if not named.field.is_output]

    @property
    def class_images_dir(self) -> str:
        """The folder beside the run's for generated class images without a ``class_data_dir``."""
        return f"{self.output_dir.rstrip('/').rpartition('/')[0]}/class-images"

    @property
    def untuned_images_dir(self) -> str:
        """The folder beside the run's for images of the untuned model, which the runs in one folder share."""
        return f"{self.output_dir.rstrip('/').rpartition('/')[0]}/untuned-images"

    @property
    def figures(self) -> list[str]:
        """The figures that a validation round measures, by their names in ``metrics.jsonl``."""
        held_out = [HELD_OUT] if self.validation.holdout else list(self.method.figures)
        return held_out + self.validation.figures

    def with_deepspeed_file(self) -> Recipe:
        """Return the recipe with the stage and offload of ``engine.deepspeed_config``.

        Raises RecipeError if the file contradicts the recipe.
        """
        engine = merge_deepspeed_file(
            self.engine, train=self.train, optimizer=self.optimizer, scaling=self.scaling
        )
        return self.model_copy(update={"engine": engine})

    def to_yaml(self) -> str:
        """Return the recipe as YAML, from which :func:`load_recipe` reads an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that rejects a key given twice in one section; PyYAML's own drops the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is given twice in one section; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe: defaults < file < ``key.path=value`` overrides.

    Relative paths start at the recipe's folder, which may be in a bucket. Raises RecipeError that lists all errors,
    each with file, key, value and the nearest known key.
    """
    tree, folder = read_tree(path, overrides)
    return build_recipe(tree, source=os.fspath(path), folder=folder)


def read_tree(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Read a recipe file with ``key.path=value`` overrides as a plain mapping, not validated; return it and its folder.

    Raises RecipeError if it is no mapping.
    """
    path = os.fspath(path)
    folder, text = _read(path)
    try:
        tree = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (method:, data:, output_dir: ...)")
    return read_overrides(tree, overrides), folder


def _read(path: str) -> tuple[str, str]:
    """Return the folder of a recipe, on disk or in a bucket, and its text."""
    if "://" in path:
        folder, _, name = path.rpartition("/")
        return folder, Storage(folder).read_text(name)
    try:
        return str(Path(path).parent.resolve()), Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no such recipe: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error


def read_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``key.path=value`` overrides to a plain mapping and return it. Raises RecipeError for a malformed one."""
    for override in overrides:
        _override(tree, override)
    return tree


def build_recipe(tree: Mapping[str, Any], *, source: str = "recipe", folder: str | None = None) -> Recipe:
    """Validate a plain mapping and return its recipe.

    Relative paths start at ``folder``; with None they are not changed. Raises RecipeError that lists all
    errors.
    """
    recipe, errors = validate_recipe(tree)
    if recipe is None or errors:
        raise RecipeError(
            f"{source} has {len(errors)} error{'s' * (len(errors) > 1)}:\n  " + "\n  ".join(errors)
        )
    recipe = _with_prompts(recipe, source, folder)
    return recipe if folder is None else resolve_paths(recipe, folder)


def _with_prompts(recipe: Recipe, source: str, folder: str | None) -> Recipe:
    """Replace the names of prompt files by the prompts in them, so that the run does not need the files."""
    try:
        prompts = read_prompts(recipe.validation.prompts, folder=folder)
    except RecipeError as error:
        raise RecipeError(f"{source}: validation.prompts:\n  {error}") from error
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"prompts": prompts})})


def validate_recipe(tree: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """Return the recipe of a plain mapping (None if a section is invalid), and all errors; paths are not changed."""
    tree = dict(tree)
    method = tree.pop("method", None)
    errors: list[str] = []
    name = method.get("name") if isinstance(method, Mapping) else method
    if not isinstance(name, str) or name not in METHODS:
        known = METHODS.names()
        errors.append(
            f"method.name: method {name!r} does not exist{nearest(str(name), known)} (known: {', '.join(known)})"
        )
    elif not isinstance(method, Mapping):
        errors.append(f"method: a section; write method: {{name: {name}}}")
    else:
        try:
            tree["method"] = METHODS.get(name).model_validate(dict(method))
        except ValidationError as error:
            errors += explain(error, METHODS.get(name), homes=_homes(method), prefix="method")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, Recipe, homes=_homes(method))
        return None, errors + [line for line in lines if "method" in tree or not line.startswith("method:")]
    errors += find_refused(dict(recipe), recipe.method.refused, by=recipe.method.name)
    errors += find_conflicts(
        method=recipe.method,
        data=recipe.data,
        train=recipe.train,
        optimizer=recipe.optimizer,
        engine=recipe.engine,
        validation=recipe.validation,
        scaling=recipe.scaling,
    )
    if (metric := recipe.validation.metric_for_best) not in (HELD_OUT, *recipe.figures):
        measured = ", ".join(recipe.figures) or "nothing"
        errors.append(f"validation.metric_for_best: validation measures {measured}, not {metric!r}")
    if recipe.search is not None:
        section = recipe.search.with_default_space(recipe.method.search_space)
        recipe = recipe.model_copy(update={"search": section})
        errors += find_search_errors(
            section,
            recipe,
            figures=recipe.figures,
            max_train_steps=recipe.train.max_train_steps,
            use_gpu=recipe.scaling.use_gpu,
            validate=lambda changed: validate_recipe(changed)[1],
        )
    return recipe, errors


def _homes(method: Any) -> dict[str, str]:
    """Return the section of every key, the first of several; a key outside sections maps to itself."""
    homes = {key: key for key in keys_at(Recipe, ())}
    for section in reversed(Recipe.model_fields):
        homes |= dict.fromkeys(keys_at(*_model_at(method, (section,))), section)
    return homes


def _model_at(method: Any, path: Sequence[str]) -> tuple[type[BaseModel], Sequence[str]]:
    """Return the pydantic model in which to look up a path, and the rest of the path.

    Each method has its own model for the ``method`` section.
    """
    name = method.get("name") if isinstance(method, Mapping) else None
    if path[:1] and path[0] == "method" and isinstance(name, str) and name in METHODS:
        return METHODS.get(name), path[1:]
    return Recipe, path


def _override(tree: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"override {text!r}: write key.path=value, such as optimizer.learning_rate=1e-5")
    node, last = tree, path.strip()
    parts: list[str] = []
    while "." in last:
        # The keys of search.space contain dots.
        part = next((key for key in node if last.startswith(f"{key}.")), last.partition(".")[0])
        last = last[len(part) + 1 :]
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"override {text!r}: {part} is a value, not a section")
        parts.append(part)
    # The file may have the key under an alias.
    for names in keys_at(*_model_at(tree.get("method"), parts)).values():
        for name in names if last in names else ():
            node.pop(name, None)
    try:
        node[last] = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise RecipeError(f"override {text!r}: the value is not YAML ({error}); put it in quotes") from error
