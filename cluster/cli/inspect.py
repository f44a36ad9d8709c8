"""The command `data inspect`: reports how a run would use an image set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dreamfleet.cluster.cli.base import (
    Address,
    AsJson,
    Overrides,
    Shared,
    Verbose,
    counting,
    local_path,
    name_of,
    print_json,
    work,
)

if TYPE_CHECKING:
    from dreamfleet.datasets.tools.inspect import Survey
    from dreamfleet.trainers.recipe import Recipe

SHOWN = 20  # files listed per table; --json lists all


def inspect(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_RECIPE", help="A folder of images, local or s3://, or a recipe (YAML)."
        ),
    ],
    overrides: Overrides = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="data.resolution, in pixels.", show_default=False)
    ] = None,
    buckets: Annotated[bool, typer.Option("--buckets", help="data.enable_bucket.")] = False,
    top: Annotated[int, typer.Option(min=0, help="Number of most frequent tags to show.")] = 20,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=local_path,
            help="Also write the report as one HTML file, to share.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    shared: Shared = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Report how an image set would be used in training, examined here or on a Ray cluster.

    Sizes and buckets, enlarged and cropped images, duplicates, broken files, captions and tags, with remedies.
    Overrides such as data.bucket_no_upscale=true also work for folders.
    """
    with work(), counting("images") as progress:
        from dreamfleet.datasets.tools.inspect import survey
        from dreamfleet.trainers.driver.data_workers import data_workers

        recipe, excluded = read_input(folder, overrides, resolution=resolution, buckets=buckets)
        name, count = _token_counter(str(recipe.model.pretrained_model_name_or_path))
        with data_workers(address, reads={"SET": _places(recipe)}, writes={}, shared=shared or ()) as workers:
            found = survey(
                recipe.data,
                count_tokens=count,
                tokenizer=name,
                max_tokens=recipe.model.max_token_length,
                excluded=excluded,
                progress=progress,
                workers=workers,
            )
        if html is not None:
            _write_page(html, found, title=name_of(folder))
    if as_json:
        print_json(found.to_json())
    else:
        print("\n".join(_lines(found, top)))


def _places(recipe: Recipe) -> list[str]:
    """Return the places whose images are examined, which all machines must see."""
    from dreamfleet.datasets.index.concepts import load_concepts

    return [concept.instance_data_dir for concept in load_concepts(recipe.data)]


def _write_page(file: Path, found: Survey, *, title: str) -> None:
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.datasets.tools.inspect_page import render_survey

    place = file.expanduser().absolute()
    Storage(place.parent).write_text(place.name, render_survey(found, _facts(found), title=title))


def read_input(
    place: str, overrides: list[str] | None, *, resolution: int | None, buckets: bool
) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe, or one for the folder, and the folders of images that are not training images.

    ``resolution`` and ``buckets`` are the options of the command; they take precedence over ``overrides``.
    """
    from dreamfleet.datasets.storage.object_store import is_address
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.recipe import build_recipe, load_recipe, read_overrides

    changes = list(overrides or [])
    changes += [f"data.resolution={resolution}"] if resolution is not None else []
    changes += ["data.enable_bucket=true"] if buckets else []
    if place.endswith((".yaml", ".yml")):
        recipe = load_recipe(place, changes)
        return recipe, recipe.excluded_folders
    tree = {
        "data": {"instance_data_dir": Storage(place).url if is_address(place) else place},
        "method": {"name": "native"},
        "output_dir": "-",
    }
    return build_recipe(read_overrides(tree, changes), source="data inspect", folder="."), {}


def _token_counter(model: str) -> tuple[str, Callable[[str], int]]:
    from dreamfleet.trainers.models.stable_diffusion.tokenizer_files import token_counter

    return token_counter(model)


def _facts(found: Survey) -> list[tuple[str, str]]:
    """Return the facts about an image set by name; lines that continue the one before have no name."""
    rows = [
        ("images", f"{found.pictures} of {found.megapixels:.1f} megapixels"),
        ("", f"{found.draws} per epoch, with repeats" if found.draws != found.pictures else ""),
        *[("class", f"{count} in {folder}") for folder, count in found.class_pictures.items()],
        ("width", _three(found.width)),
        ("height", _three(found.height)),
        ("used at", ", ".join(f"{size}: {count}" for size, count in found.shown_at.items())),
        (
            "enlarged",
            f"{found.enlarged}, up to {found.largest_scale:.2f} times" if found.enlarged else "none",
        ),
        ("cut off", f"{found.cut_off:.0%} of an image on average, {found.most_cut_off:.0%} at most"),
        ("formats", _counts(found.formats)),
        ("colours", f"{_counts(found.profiles)}; converted to sRGB" if found.profiles else ""),
        ("masks", f"{found.masks} as files, {found.transparent} by transparency"),
        ("rotated", f"{found.turned} by EXIF" if found.turned else ""),
        ("grey", f"{found.grey}" if found.grey else ""),
        ("captions", f"{found.captioned} of {found.pictures}"),
    ]
    if found.captioned:
        rows.append(
            ("tokens", f"{_three(found.tokens)}; at most {found.max_tokens} are used ({found.tokenizer})")
        )
    return [(name, text) for name, text in rows if text]


def _lines(found: Survey, top: int) -> list[str]:
    lines = [f"{name:<10} {text}".rstrip() for name, text in _facts(found)]
    if found.tags and top:
        shown = list(found.tags.items())[:top]
        lines += ["", f"tags: {len(found.tags)}, the most frequent:"]
        lines += [f"  {count:>6}  {tag}" for tag, count in shown]
    for title, groups in (("duplicates", found.copies), ("near duplicates", found.near)):
        if groups:
            lines += ["", f"{title}:", *_some([" = ".join(group) for group in groups])]
    shared = [f"{file}: {', '.join(images)}" for file, images in found.shared.items()]
    over = [f"{item['place']}: {item['reason']} ({_files(item['files'])})" for item in found.skipped]
    over += [f"other files: {_counts(found.others)}"] if found.others else []
    for title, rest in (("one caption for several images:", shared), ("skipped:", over)):
        lines += ["", title, *_some(rest)] if rest else []
    if found.bad:
        lines += ["", "unusable:", *_some([f"{file}: {reason}" for file, reason in found.bad.items()])]
    return [*lines, "", *([f"! {text}" for text in found.warnings] or ["no problems found"])]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def _files(count: int) -> str:
    return f"{count} {'file' if count == 1 else 'files'}"


def _three(values: tuple[int, int, int]) -> str:
    return f"{values[0]} to {values[2]}, median {values[1]}"


def _some(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN} more (all with --json)"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more
