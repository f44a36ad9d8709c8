"""The command `data browse`: look through, filter and edit an image set on a local page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamfleet.cluster.cli.base import AsJson, Overrides, Verbose, name_of, print_json, work
from dreamfleet.cluster.cli.inspect import read_input
from dreamfleet.cluster.cli.pages import Browser, Port, serve

if TYPE_CHECKING:
    from dreamfleet.cluster.labeling.server import LocalPage
    from dreamfleet.trainers.recipe import Recipe


def browse(
    place: Annotated[
        str,
        typer.Argument(
            metavar="SET_OR_RECIPE",
            help="A set of images, local or s3://, or a recipe (YAML).",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="data.resolution, in pixels.", show_default=False)
    ] = None,
    buckets: Annotated[bool, typer.Option("--buckets", help="data.enable_bucket.")] = False,
    near: Annotated[
        bool, typer.Option("--near", help="Also find near duplicates; every new image is decoded once.")
    ] = False,
    write_back: Annotated[
        bool,
        typer.Option(
            "--write-back", help="Write edited captions and masks to files beside the images, and exit."
        ),
    ] = False,
    port: Port = 0,
    browser: Browser = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Browse and edit an image set on a local web page.

    Filter by tag, size, bucket, state; edit captions, crops, focus points and masks; exclude images; see the images and
    captions of any training step. Edits are stored beside the set, and every training applies them; the images and
    their files are not changed without --write-back. The page is usable by keyboard: ? lists the keys.
    """
    with work():
        recipe, excluded = read_input(place, overrides, resolution=resolution, buckets=buckets)
        if write_back:
            found = _write_back(recipe, excluded)
        else:
            found = _serve(recipe, excluded, place, near=near, port=port, browser=browser)
    if as_json:
        print_json(found)
    else:
        print("\n".join(f"{name:<8} {value}" for name, value in found.items() if value not in ("", [])))


def _serve(
    recipe: Recipe, excluded: dict[str, str], place: str, *, near: bool, port: int, browser: bool
) -> dict[str, Any]:
    from dreamfleet.cluster.browse.image_table import load_table
    from dreamfleet.cluster.browse.page import MAX_REQUEST_BYTES, BrowsePage

    modes = _label_mode(recipe)
    page = BrowsePage(
        recipe,
        lambda: load_table(recipe.data, excluded=excluded, near=near),
        title=name_of(place),
        modes=dict.fromkeys(modes, "Label"),
    )
    serve(
        page,
        port=port,
        title="browse the images",
        browser=browser,
        modes=modes,
        max_request_bytes=MAX_REQUEST_BYTES,
    )
    return page.report()


def _write_back(recipe: Recipe, excluded: dict[str, str]) -> dict[str, Any]:
    from dreamfleet.cluster.browse.image_table import load_table
    from dreamfleet.cluster.browse.write_back import write_back

    return dict(write_back(load_table(recipe.data, excluded=excluded))._asdict())


def _label_mode(recipe: Recipe) -> dict[str, LocalPage]:
    """Return the labelling page of a set that is one local folder; no mode for other sets."""
    import os

    from dreamfleet.cluster.labeling.labels import Labelling
    from dreamfleet.datasets.errors import DataError
    from dreamfleet.datasets.index.concepts import load_concepts
    from dreamfleet.datasets.index.labels import LABELS_FILE

    folders = [concept.instance_data_dir for concept in load_concepts(recipe.data)]
    if len(folders) != 1 or not os.path.isdir(folders[0]):
        return {}
    names = list(getattr(recipe.method, "classes", None) or ("other", "good"))
    try:
        return {"label": Labelling(folders[0], os.path.join(folders[0], LABELS_FILE), names, back=True)}
    except DataError:  # the folder has a dataset.json of another kind
        return {}
