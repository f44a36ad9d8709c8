"""Writes docs/recipes.md, the recipe reference, from the recipe's pydantic models (`make docs`)."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from dreamfleet.datasets.registry import EntryName
from dreamfleet.datasets.set_config import SetOptions
from dreamfleet.trainers.artifacts.kind import ARTIFACTS
from dreamfleet.trainers.config.engines import ENGINES
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.metrics import METRICS, NEEDS, Figure, Metric
from dreamfleet.trainers.config.optimizers import OPTIMIZERS
from dreamfleet.trainers.config.search import Domain
from dreamfleet.trainers.recipe import Recipe

PAGE = Path(__file__).with_name("recipes.md")
HEAD = """<!-- Written by `make docs` from the sections in the code; edit those. -->
# Recipes

A recipe is a YAML file that describes one run. Values come from the defaults, then the file, then `key.path=value` on
the command line:

```bash
dreamfleet train recipes/demo.yaml train.max_train_steps=600 optimizer.learning_rate=5e-5
```

- Unknown keys and invalid values are errors. All errors are reported together before the run starts, each with the
  nearest known key. Checks never change a value.
- Relative paths start at the recipe's folder, not at the current directory.
- `train_batch_size` is per worker: the global batch is workers x train_batch_size x gradient_accumulation_steps.
  `max_train_steps` counts optimizer steps for any number of workers.
- `learning_rate` takes a number or the webui's schedule string, `0.005:100, 1e-3:1000` (0.005 until step 100, then 1e-3
  until step 1000).
- `dreamfleet config RECIPE` prints the recipe with all defaults; `dreamfleet check RECIPE` tests it without training.
- Names after "also" are accepted instead of the key: the names of the same option in diffusers, kohya's scripts or the
  webui.
"""

SECTIONS = {
    "method": "the training method and its options: [method](#method)",
    "model": "the base model: [model](#model)",
    "data": "images and captions: [data](#data)",
    "train": "length, batches, precision, checkpoints: [train](#train)",
    "optimizer": "optimizer, learning rates, schedule: [optimizer](#optimizer)",
    "engine": "torch or DeepSpeed, sharding, offloading: [engine](#engine)",
    "validation": "held-out loss, previews and metrics: [validation](#validation)",
    "scaling": "workers and their resources: [scaling](#scaling)",
    "storage": "what a run does while its bucket is away: [storage](#storage)",
    "search": "the search of `dreamfleet tune`: [search](#search)",
    "fleet": "the limits of `dreamfleet fleet`: [fleet](#fleet)",
    "tracking": "names and folder for `report_to`: [tracking](#tracking)",
    "report_to": "where metrics and previews are also shown, see [Monitoring](monitoring.md); `[]` for none",
}
# Descriptions of the keys whose fields have none.
DESCRIPTIONS = {
    "data.instance_data_dir": "folder of the subject's images, including subfolders, on disk or in a bucket",
    "data.instance_prompt": "prompt of images without a caption: `a sks cat`",
    "data.class_data_dir": "folder of images of the subject's class, for prior preservation",
    "data.class_prompt": "prompt of the class images: `a cat`; missing images are generated from it",
    "data.train_data_dir": "kohya's layout: subfolders named `10_sks cat` (repeats, prompt)",
    "data.concepts_list": "several subjects in one run, as a list or as a JSON file in Shivam Shrirao's layout",
    "data.caption_extension": "suffixes of caption files beside the images",
    "data.use_captions": "use captions if there are any",
    "data.shuffle_tags": "shuffle a caption's comma-separated tags at each use",
    "data.keep_tokens": "number of leading tags that are neither shuffled nor dropped",
    "data.tag_dropout": "probability of dropping each tag",
    "data.caption_dropout": "probability of dropping the whole caption",
    "data.resolution": "pixels of a side",
    "data.center_crop": "crop at the centre; otherwise at a random position at each use",
    "data.random_flip": "mirror images with probability 0.5",
    "data.repeats": "uses of each image per epoch",
    "data.max_pixels": "larger images are rejected as decompression bombs",
    "data.source": "`resident`: all images in memory; `stream`: read when used; `auto`: by size",
    "data.resident_limit_mb": "size above which `auto` streams",
    "data.cache_latents": "encode each image once instead of at every step",
    "data.latent_sampling": "sample the VAE's posterior at each use or once, or use its mean",
}


def type_words(annotation: Any) -> str:
    """Return the description of a type for readers of recipes."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        for rule in arguments[1:]:
            if isinstance(check := getattr(rule, "func", None), EntryName):
                return ", ".join(f"`{name}`" for name in check.registry.names())
        return type_words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(a) for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (list, tuple):
        return "list of " + type_words(arguments[0])
    if origin is dict:
        inner = type_words(arguments[1])
        return f"mapping of {inner}" if "](#" in inner else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (
            f"[{annotation.__name__}](#{annotation.__name__.lower()})"
            if annotation.__name__ in ("Concept", "Domain", "ImageSet")
            else "section"
        )
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", Path: "path"}
    return words.get(annotation, getattr(annotation, "__name__", "any"))


def bounds(info: FieldInfo) -> str:
    """Return the limits of a number as text."""
    limits = []
    for rule in info.metadata:
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if (value := getattr(rule, name, None)) is not None:
                limits.append(f"{words} {value:,}".replace(",", " "))
    return ", ".join(limits)


def default_words(info: FieldInfo) -> str:
    """Return a default as YAML."""
    if info.is_required():
        return "*required*"
    value = info.get_default(call_default_factory=True)
    if value is None or value == {}:
        return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if str(value) else '`""`'


def table(model: type[BaseModel], section: str) -> str:
    """Return a section's keys as a Markdown table."""
    rows = ["| key | type | default | description |", "| --- | --- | --- | --- |"]
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        others = [str(a) for a in alias.choices if a != name] if isinstance(alias, AliasChoices) else []
        also = "also " + ", ".join(f"`{a}`" for a in others) if others else ""
        what = type_words(typing.Annotated[info.annotation, None, *info.metadata]) + (
            f", {limits}" if (limits := bounds(info)) else ""
        )
        said = info.description or DESCRIPTIONS.get(f"{section}.{name}")
        if not said and issubclass(model, SetOptions):
            said = "as in [data](#data), for these images"
        if name == "name":
            said = said or "the method"
        if section == "recipe":
            said = SECTIONS.get(name, info.description)
        if not said:
            raise SystemExit(f"{section}.{name} has no description: add one to its Field")
        meaning = "; ".join(words for words in (said, also) if words)
        cells = (f"`{name}`", what, default_words(info), meaning)
        rows.append("| " + " | ".join(re.sub(r"\s+", " ", c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)


def summary(model: type) -> str:
    """Return the first paragraph of a docstring as Markdown."""
    first = (model.__doc__ or "").strip().split("\n\n")[0]
    return re.sub(r"\s+", " ", first).replace("``", "`")


def write() -> str:
    """Return the content of docs/recipes.md."""
    parts = [HEAD, "## Sections\n", table(Recipe, "recipe")]
    nested: dict[str, type[BaseModel]] = {}
    for name, info in Recipe.model_fields.items():
        section = next((x for x in typing.get_args(info.annotation) if x is not type(None)), info.annotation)
        if isinstance(section, type) and issubclass(section, BaseModel) and name != "method":
            parts += [f"\n## {name}\n", table(section, name)]
            nested |= inner_models(section)
        if name == "validation":
            parts.append(metrics_table())
        if name == "optimizer":
            parts += optimizers()
        if name == "engine":
            parts += engines()
        if name == "search":
            parts.append(default_spaces())
    parts.append("\n## method\n\n`name` selects the method; the other keys are its options.")
    for name, method in METHODS.items():
        parts += [f"\n### {name}\n\n{method.summary}\n", table(method, name)]
        nested |= inner_models(method)
    parts.append(artifacts_table())
    for name, model in nested.items():
        parts += [f"\n## {name}\n\n{summary(model)}\n", table(model, name)]
    return "\n".join(parts) + "\n"


def metrics_table() -> str:
    """Return the section on the registered metrics."""
    rows = [
        "\n### metrics\n",
        "`loss`, `overfitting` and `view_loss` need no previews; the others score them and need `validation.prompts`.",
        "A search compares trials by a metric or by one of its parts: [which one](searches.md#which-metric).",
        "Installed packages can [add metrics](extending.md#a-metric).\n",
        "| `validation.metrics` | `search.metric` | better | measures | needs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, metric in METRICS.items():
        needs = "; ".join(NEEDS[need] for need in metric.needs)
        if metric.uses:
            needs += f"; where given: {', '.join(NEEDS[need] for need in metric.uses)}"
        figures: dict[str, Metric | Figure] = {metric.figure or name: metric, **metric.parts}
        for key, figure in figures.items():
            better = "higher" if figure.higher_is_better else "lower"
            first, last = (f"`{name}`", needs) if figure is metric else ("", "")
            rows.append(f"| {first} | `{key}` | {better} | {figure.title}. {figure.note} | {last} |")
    return "\n".join(rows)


def default_spaces() -> str:
    """Return the section on the spaces of a search without ``search.space``."""
    rows = [
        "\n### Default spaces\n",
        "The space of a search without `search.space`, by method. `dreamfleet config RECIPE` prints the one in use.\n",
        "| method | key | values |",
        "| --- | --- | --- |",
    ]
    spaces = {title: space for _, method in METHODS.items() for title, space in method.search_spaces.items()}
    for title, space in spaces.items():
        for path, fields in space.items():
            rows.append(f"| {title} | `{path}` | {domain_words(Domain(**fields))} |")
    return "\n".join(rows)


def domain_words(domain: Domain) -> str:
    """Return the values of a searched key for readers of recipes."""
    if domain.values is not None:
        return ", ".join(f"`{value}`" for value in domain.values)
    lower, upper = domain.range()
    return (
        f"{lower:g} to {upper:g}"
        + ", whole numbers" * domain.whole
        + ", evenly in the logarithm" * domain.log
    )


def artifacts_table() -> str:
    """Return the section on the registered artifact kinds."""
    rows = [
        "\n### Artifacts\n",
        "The kinds of artifacts that methods export ([formats](formats.md)). Packages [add](extending.md) others.\n",
        "| kind | artifact | files | methods | `export --format` | `sample` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in ARTIFACTS.items():
        files = [f"`{suffix}`" for suffix in kind.suffixes] + (["folder"] if kind.marker else [])
        methods = [method for method, section in METHODS.items() if name in section.artifacts]
        formats = [f"`{form}`" for form in kind.formats]
        option = f"`--{kind.option}`" if kind.option else ""
        cells = (f"`{name}`", summary(kind), *(", ".join(each) for each in (files, methods, formats)), option)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def engines() -> list[str]:
    """Return lines that list the values of ``engine.name`` and the engines' options."""
    lines = [f"- `{name}`: {summary(engine)}" for name, engine in ENGINES.items()]
    options = [
        f"\n### Options of {name}\n\n" + table(engine.Options, name)
        for name, engine in ENGINES.items()
        if engine.Options.model_fields
    ]
    return ["\n`name` selects the engine:\n", *lines, *options]


def optimizers() -> list[str]:
    """Return lines that list the values of ``optimizer.name`` and the keys of ``optimizer.options``."""
    lines = [
        "\n### optimizers\n",
        "[Optimizers](optimizers.md) compares them. Installed packages can [add more](extending.md#an-optimizer).\n",
        "| `optimizer.name` | description | `optimizer.options` |",
        "| --- | --- | --- |",
    ]
    shown: dict[type[BaseModel], str] = {}
    for name, kind in OPTIMIZERS.items():
        title = shown.setdefault(kind.Options, f"Options of {name}")
        link = "#" + title.lower().replace(" ", "-")
        lines.append(f"| `{name}` | {kind.summary} | [{len(kind.Options.model_fields)} keys]({link}) |")
    tables = [f"\n### {title}\n\n" + table(options, "options") for options, title in shown.items()]
    return [*lines, *tables]


def inner_models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the models inside a section's values, by name."""
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
