"""Writes docs/recipes.md from the models that read a recipe, so that the page cannot lie: `make docs`."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from dreamfleet.trainers.methods.base import discover
from dreamfleet.trainers.recipe import Recipe

PAGE = Path(__file__).with_name("recipes.md")
HEAD = """<!-- Written by `make docs` from the models in the code; edit those. -->
# Recipes

A recipe is one YAML file: one run. Defaults come first, then the file, then `key.path=value` on the command line:

```bash
dreamfleet train recipes/demo.yaml train.max_train_steps=600 optimizer.learning_rate=5e-5
```

- An unknown key or a wrong value stops the run before it starts; all mistakes are told at once, each with the nearest
  known key. No check changes a value.
- Relative paths start at the recipe's folder, not where you stand.
- `train_batch_size` is per worker: the global batch is workers x train_batch_size x gradient_accumulation_steps.
  `max_train_steps` counts optimizer steps on any number of workers.
- `learning_rate` takes a number or webui's schedule string, `0.005:100, 1e-3:1000` (0.005 until step 100, then 1e-3
  until step 1000).
- `dreamfleet config RECIPE` prints the recipe with every default filled in, `dreamfleet check RECIPE` tries it.
- Names on the right of "also" are accepted in place of the key: diffusers', kohya's and webui's words for the same
  thing.
"""


def type_words(annotation: Any) -> str:
    """Write a type as a reader of recipes would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(a) for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (list, tuple):
        return "list of " + type_words(arguments[0])
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", Path: "path"}
    return words.get(annotation, getattr(annotation, "__name__", "any"))


def bounds(info: FieldInfo) -> str:
    """Write the limits of a number."""
    told = []
    for rule in info.metadata:
        for name, words in (("ge", "at least"), ("gt", "over"), ("le", "at most"), ("lt", "under")):
            if (value := getattr(rule, name, None)) is not None:
                told.append(f"{words} {value:g}")
    return ", ".join(told)


def default_words(info: FieldInfo) -> str:
    """Write a default as it would stand in YAML."""
    if info.is_required():
        return "*required*"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if str(value) else '`""`'


def table(model: type[BaseModel]) -> str:
    """Return the table of a section's keys."""
    rows = ["| key | takes | default | |", "| --- | --- | --- | --- |"]
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        others = [str(a) for a in alias.choices if a != name] if isinstance(alias, AliasChoices) else []
        also = "also " + ", ".join(f"`{a}`" for a in others) if others else ""
        what = type_words(info.annotation) + (f", {limits}" if (limits := bounds(info)) else "")
        meaning = "; ".join(words for words in (info.description or "", also) if words)
        cells = (f"`{name}`", what, default_words(info), meaning)
        rows.append("| " + " | ".join(re.sub(r"\s+", " ", c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)


def summary(model: type) -> str:
    """Return the first paragraph of a docstring as Markdown."""
    first = (model.__doc__ or "").strip().split("\n\n")[0]
    return re.sub(r"\s+", " ", first).replace("``", "`")


def write() -> str:
    """Return the whole page."""
    parts = [HEAD, "## The whole\n", table(Recipe)]
    nested: dict[str, type[BaseModel]] = {}
    for name, info in Recipe.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and name != "method":
            parts += [f"\n## {name}\n", table(section)]
            nested |= inner_models(section)
    parts.append("\n## method\n\n`name` chooses the method; the other keys are its own.")
    for name, method in sorted(discover().items()):
        parts += [f"\n### {name}\n\n{summary(method)}\n", table(method.Config)]
        nested |= inner_models(method.Config)
    for name, model in nested.items():
        parts += [f"\n## {name}\n\n{summary(model)}\n", table(model)]
    return "\n".join(parts) + "\n"


def inner_models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """List the models that a section's values are made of."""
    found: dict[str, type[BaseModel]] = {}
    todo = [info.annotation for info in model.model_fields.values()]
    while todo:
        annotation = todo.pop()
        todo += typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found[annotation.__name__] = annotation
    return found


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
