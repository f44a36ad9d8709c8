"""The recipe: one YAML file a run, its sections composed, every mistake told at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.config_base import Section, as_list
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.index.exclusions import HELD_OUT
from dreamfleet.datasets.path_field import NamedPath, PathField, list_paths, resolve_paths
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.conflicts import find_conflicts
from dreamfleet.trainers.config.deepspeed import merge_deepspeed_file
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import find_refused
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.prompt_lines import read_prompts
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.config.search import SearchConfig, figures_of, find_search_errors
from dreamfleet.trainers.config.train import TrainConfig
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.config.validation_errors import keys_at, nearest, tell


class Recipe(Section):
    """One run: what learns, from what, how, on how many machines, and where to."""

    method: SerializeAsAny[MethodConfig]
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    scaling: ScalingConfig = ScalingConfig()
    search: SearchConfig | None = Field(None, description="for `dreamfleet tune`")
    output_dir: Annotated[str, PathField("folder", must_exist=False, is_output=True)] = Field(
        min_length=1, description="folder or s3:// address; its last part names the artefacts"
    )
    report_to: Annotated[list[Literal["tensorboard"]], BeforeValidator(as_list)] = Field(
        ["tensorboard"], validation_alias=AliasChoices("report_to", "log_with")
    )

    @property
    def run_name(self) -> str:
        """The run's name: the last part of ``output_dir``."""
        return self.output_dir.rstrip("/").rpartition("/")[2]

    @property
    def apart(self) -> dict[str, str]:
        """The folders of a run that hold images it does not train on, and what they hold."""
        places = {self.output_dir: "the run's output_dir"}
        return places | ({self.validation.holdout: HELD_OUT} if self.validation.holdout else {})

    @property
    def paths(self) -> list[NamedPath]:
        """The absolute paths and URLs that the run reads, with their keys."""
        return [named for named in list_paths(self) if not named.field.is_output]

    @property
    def class_images_dir(self) -> str:
        """The folder beside the run's where generated class images without a ``class_data_dir`` are kept."""
        return f"{self.output_dir.rstrip('/').rpartition('/')[0]}/class-images"

    @property
    def figures(self) -> list[str]:
        """What a validation round measures, by the names in ``metrics.jsonl``."""
        return figures_of(self.validation, self.method)

    def with_deepspeed_file(self) -> Recipe:
        """Return the recipe with the stage and offload of ``engine.deepspeed_config``. Raises RecipeError."""
        engine = merge_deepspeed_file(
            self.engine, train=self.train, optimizer=self.optimizer, scaling=self.scaling
        )
        return self.model_copy(update={"engine": engine})

    def to_yaml(self) -> str:
        """Write the recipe as YAML that :func:`load_recipe` reads back to the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section, as YAML does; PyYAML alone forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} stands twice in one section; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: defaults < file < ``key.path=value``. Relative paths start at the recipe's
    folder, which may be in a bucket.

    Raises RecipeError that lists every mistake with file, key, value and the nearest known key.
    """
    path = os.fspath(path)
    folder, text = _read(path)
    try:
        tree = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (method:, data:, output_dir: ...)")
    return build_recipe(read_overrides(tree, overrides), source=path, folder=folder)


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
    """Write ``key.path=value`` changes into a plain mapping, and return it. RecipeError for what is no change."""
    for override in overrides:
        _override(tree, override)
    return tree


def build_recipe(tree: Mapping[str, Any], *, source: str = "recipe", folder: str | None = None) -> Recipe:
    """Validate a plain mapping. ``folder`` makes relative paths absolute; None leaves them."""
    recipe, mistakes = _validate(tree)
    if recipe is None or mistakes:
        raise RecipeError(
            f"{source} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:\n  " + "\n  ".join(mistakes)
        )
    recipe = _with_prompts(recipe, source, folder)
    return recipe if folder is None else resolve_paths(recipe, folder)


def _with_prompts(recipe: Recipe, source: str, folder: str | None) -> Recipe:
    """Put the prompts of files into the recipe, which then needs the files no more."""
    try:
        prompts = read_prompts(recipe.validation.prompts, folder=folder)
    except RecipeError as error:
        raise RecipeError(f"{source}: validation.prompts:\n  {error}") from error
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"prompts": prompts})})


def _validate(tree: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    tree = dict(tree)
    method = tree.get("method")
    mistakes: list[str] = []
    config = None
    if isinstance(method, str) and method in METHODS:
        mistakes.append(f"method: a section; write method: {{name: {method}}}")
        tree.pop("method")
    elif not isinstance(method, Mapping) or method.get("name") not in METHODS:
        given = method.get("name") if isinstance(method, Mapping) else method
        known = METHODS.names()
        mistakes.append(
            f"method.name: {given!r} is no method{nearest(str(given), known)}; known: {', '.join(known)}"
        )
        tree.pop("method", None)
    else:
        try:
            config = METHODS.get(method["name"]).model_validate(dict(method))
            tree["method"] = config
        except ValidationError as error:
            mistakes += tell(error, METHODS.get(method["name"]), homes=_homes(method), prefix="method")
            tree.pop("method")
    recipe = None
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        had_method = config is not None
        told = tell(error, Recipe, homes=_homes(method))
        mistakes += [line for line in told if had_method or not line.startswith("method:")]
    if recipe is not None and config is not None:
        mistakes += find_refused(dict(recipe), config.refused, by=config.name)
    if recipe is not None:
        mistakes += find_conflicts(
            method=recipe.method,
            data=recipe.data,
            train=recipe.train,
            optimizer=recipe.optimizer,
            engine=recipe.engine,
            validation=recipe.validation,
            scaling=recipe.scaling,
        )
    if recipe is not None and recipe.search is not None:
        mistakes += find_search_errors(
            recipe.search,
            recipe,
            figures=recipe.figures,
            max_train_steps=recipe.train.max_train_steps,
            validate=lambda changed: _validate(changed)[1],
        )
    return recipe, mistakes


def _homes(method: Any) -> dict[str, str]:
    """Say of every key which section has it, the first one of several; a key outside sections has itself."""
    homes = {key: key for key in keys_at(Recipe, ())}
    for section in reversed(Recipe.model_fields):
        homes |= dict.fromkeys(keys_at(*_model_at(method, (section,))), section)
    return homes


def _model_at(method: Any, path: Sequence[str]) -> tuple[type[BaseModel], Sequence[str]]:
    """Return the model to look a path up in, and the rest of the path: a method's keys are in its own model."""
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
        # The keys of search.space hold dots themselves.
        part = next((key for key in node if last.startswith(f"{key}.")), last.partition(".")[0])
        last = last[len(part) + 1 :]
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"override {text!r}: {part} is a value, not a section")
        parts.append(part)
    # The key may stand in the file under another of its names.
    for names in keys_at(*_model_at(tree.get("method"), parts)).values():
        for name in names if last in names else ():
            node.pop(name, None)
    try:
        node[last] = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise RecipeError(f"override {text!r}: the value is not YAML ({error}); put it in quotes") from error
