"""Writes docs/recipes.md from the models that read a recipe, so that the page cannot lie: `make docs`."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from dreamfleet.datasets.registry import EntryName
from dreamfleet.trainers.artifacts.kind import ARTIFACTS
from dreamfleet.trainers.config.engines import ENGINES
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.metrics import METRICS, NEEDS
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

SECTIONS = {
    "method": "what learns, and how: [method](#method)",
    "model": "the model it starts from: [model](#model)",
    "data": "the pictures and their words: [data](#data)",
    "train": "how long, how many at a time, what is saved: [train](#train)",
    "optimizer": "learning rate, schedule, AdamW's numbers: [optimizer](#optimizer)",
    "engine": "what moves the weights: [engine](#engine)",
    "validation": "held-out loss and preview pictures: [validation](#validation)",
    "scaling": "workers and what each of them gets: [scaling](#scaling)",
    "search": "what `dreamfleet tune` tries: [search](#search)",
    "report_to": "further places for figures and previews; `[]` for none",
}
# Said here where the code's own name, type and limits say it to those who read code.
MEANINGS = {
    "model.pretrained_model_name_or_path": "`pocket`, a diffusers folder, a hub name, a `.safetensors` or `.ckpt` file",
    "model.revision": "branch, tag or commit of a hub name",
    "model.variant": "such as `fp16`, for folders that hold several",
    "model.pretrained_vae_model_name_or_path": "a VAE in place of the model's own",
    "data.instance_data_dir": "folder of the subject's pictures (its subfolders too), on disk or in a bucket",
    "data.instance_prompt": "the prompt of pictures without a caption: `a sks cat`",
    "data.class_data_dir": "folder of pictures of the subject's class, for prior preservation",
    "data.class_prompt": "what class pictures show: `a cat`; missing ones are generated from it",
    "data.train_data_dir": "kohya's layout: subfolders named `10_sks cat` (repeats, prompt)",
    "data.concepts_list": "several subjects in one run, as a list or as a JSON file in Shivam Shrirao's layout",
    "data.caption_extension": "endings of caption files beside the pictures",
    "data.use_captions": "use the captions that are found",
    "data.shuffle_tags": "shuffle a caption's comma-separated tags every time it is used",
    "data.keep_tokens": "so many tags in front are neither shuffled nor dropped",
    "data.tag_dropout": "chance of each tag to be left out",
    "data.caption_dropout": "chance of the whole caption to be left out",
    "data.resolution": "pixels of a side",
    "data.center_crop": "crop around the middle; else at a place drawn anew every time",
    "data.random_flip": "mirror half of the time",
    "data.repeats": "uses of each picture in an epoch",
    "data.max_pixels": "larger pictures are refused as decompression bombs",
    "data.source": "`resident`: everything in memory; `stream`: read as it is used; `auto`: by size",
    "data.resident_limit_mb": "the size at which `auto` begins to stream",
    "data.cache_latents": "encode every picture once, not at every step",
    "data.latent_sampling": "draw from the VAE's posterior every time, once, or take its mean",
    "train.num_train_epochs": "instead of max_train_steps: passes over the pictures",
    "train.gradient_accumulation_steps": "batches whose gradients make one optimizer step",
    "train.seed": "of everything that is drawn; the same seed gives the same run",
    "train.mixed_precision": "type of the computation; weights stay float32 (but see full_bf16)",
    "train.gradient_checkpointing": "less memory for about a quarter more time",
    "train.snr_gamma": "min-SNR weighting, 5 as in the paper (Hang et al. 2023)",
    "train.noise_offset": "noise added per picture and channel, about 0.05 for darker and brighter pictures",
    "train.checkpoints_total_limit": "older ones are removed",
    "train.log_steps": "every so many optimizer steps",
    "train.save_precision": "type of the weights in artefacts",
    "optimizer.name": "`adamw8bit` needs a GPU and the extra `gpu`; `adafactor` keeps hardly any state",
    "optimizer.learning_rate": "a number, or webui's schedule string",
    "optimizer.lr_scheduler": "diffusers' schedules; one tick an optimizer step",
    "optimizer.adam_beta1": "AdamW's beta 1",
    "optimizer.adam_beta2": "AdamW's beta 2",
    "optimizer.adam_weight_decay": "AdamW's weight decay",
    "optimizer.adam_epsilon": "AdamW's epsilon",
    "optimizer.lr_power": "of the polynomial schedule",
    "engine.ema_decay": "of the average of the weights",
    "validation.prompts": "one row of previews each",
    "validation.negative_prompt": "of the previews",
    "validation.num_images": "previews of each prompt",
    "validation.num_inference_steps": "sampler steps of a preview",
    "validation.guidance_scale": "of the previews",
    "validation.scheduler": "sampler of the previews",
    "validation.seed": "of the first preview of a prompt; the next ones count up",
    "scaling.placement_strategy": "how Ray spreads workers over machines",
    "method.name": "the method",
    "dreambooth.train_text_encoder": "the text encoder learns as well",
    "dreambooth.with_prior_preservation": "keep the class as it was, with class pictures beside the subject's",
    "dreambooth.prior_loss_weight": "of the class pictures' loss",
    "dreambooth.prior_generation_guidance": "guidance of generated class pictures",
    "textual_inversion.placeholder_token": "the new word: `<my-cat>`",
    "textual_inversion.initializer_token": "word or words the vectors start from: `cat`",
    "textual_inversion.num_vectors": "vectors the new word is made of; all of them learn",
    "textual_inversion.learnable_property": "which templates make the prompts",
    "Concept.instance_data_dir": "as in [data](#data), for this concept",
    "Concept.instance_prompt": "as in [data](#data)",
    "Concept.class_data_dir": "as in [data](#data)",
    "Concept.class_prompt": "as in [data](#data)",
    "Concept.repeats": "as in [data](#data)",
    "Concept.mask_dir": "as in [data](#data)",
}


def type_words(annotation: Any) -> str:
    """Write a type as a reader of recipes would say it."""
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
            if annotation.__name__ in ("Concept", "Domain")
            else "section"
        )
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", Path: "path"}
    return words.get(annotation, getattr(annotation, "__name__", "any"))


def bounds(info: FieldInfo) -> str:
    """Write the limits of a number."""
    told = []
    for rule in info.metadata:
        for name, words in (("ge", "at least"), ("gt", "over"), ("le", "at most"), ("lt", "under")):
            if (value := getattr(rule, name, None)) is not None:
                told.append(f"{words} {value:,}".replace(",", " "))
    return ", ".join(told)


def default_words(info: FieldInfo) -> str:
    """Write a default as it would stand in YAML."""
    if info.is_required():
        return "*required*"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if str(value) else '`""`'


def table(model: type[BaseModel], section: str) -> str:
    """Return the table of a section's keys."""
    rows = ["| key | takes | default | what it does |", "| --- | --- | --- | --- |"]
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        others = [str(a) for a in alias.choices if a != name] if isinstance(alias, AliasChoices) else []
        also = "also " + ", ".join(f"`{a}`" for a in others) if others else ""
        what = type_words(info.annotation) + (f", {limits}" if (limits := bounds(info)) else "")
        said = info.description or MEANINGS.get(f"{section}.{name}") or MEANINGS.get(f"method.{name}")
        if section == "recipe":
            said = SECTIONS.get(name, info.description)
        if not said:
            raise SystemExit(
                f"{section}.{name} has no description: write one in its Field or in docs/write_recipes.py"
            )
        meaning = "; ".join(words for words in (said, also) if words)
        cells = (f"`{name}`", what, default_words(info), meaning)
        rows.append("| " + " | ".join(re.sub(r"\s+", " ", c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)


def summary(model: type) -> str:
    """Return the first paragraph of a docstring as Markdown."""
    first = (model.__doc__ or "").strip().split("\n\n")[0]
    return re.sub(r"\s+", " ", first).replace("``", "`")


def write() -> str:
    """Return the whole page."""
    parts = [HEAD, "## The whole\n", table(Recipe, "recipe")]
    nested: dict[str, type[BaseModel]] = {}
    for name, info in Recipe.model_fields.items():
        section = next((x for x in typing.get_args(info.annotation) if x is not type(None)), info.annotation)
        if isinstance(section, type) and issubclass(section, BaseModel) and name != "method":
            parts += [f"\n## {name}\n", table(section, name)]
            nested |= inner_models(section)
        if name == "validation":
            parts.append(metrics_table())
        if name == "engine":
            parts += engines()
    parts.append("\n## method\n\n`name` chooses the method; the other keys are its own.")
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
        "All metrics but `loss` score the previews, so they also need `validation.prompts`.",
        "Installed packages can [add metrics](extending.md#a-metric).\n",
        "| `validation.metrics` | `search.metric` | better | measures | needs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, metric in METRICS.items():
        better = "higher" if metric.higher_is_better else "lower"
        needs = "; ".join(NEEDS[need] for need in metric.needs)
        rows.append(
            f"| `{name}` | `{metric.figure or name}` | {better} | {metric.title}. {metric.note} | {needs} |"
        )
    return "\n".join(rows)


def artifacts_table() -> str:
    """Return the section on the registered artifact kinds."""
    rows = [
        "\n### Artifacts\n\nThe kinds of artifacts that methods export ([formats](formats.md)). Other kinds are added by "
        "[installed packages](extending.md).\n",
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
    """List the engines that ``engine.name`` selects, and the options of those that have some."""
    lines = [f"- `{name}`: {summary(engine)}" for name, engine in ENGINES.items()]
    options = [
        f"\n### Options of {name}\n\n" + table(engine.Options, name)
        for name, engine in ENGINES.items()
        if engine.Options.model_fields
    ]
    return ["\n`name` selects the engine:\n", *lines, *options]


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
