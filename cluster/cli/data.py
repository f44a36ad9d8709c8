"""The commands `dreamfleet data ...`: preparing image sets for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli import browse as cli_browse
from dreamfleet.cluster.cli import cache as cli_cache
from dreamfleet.cluster.cli import caption as cli_caption
from dreamfleet.cluster.cli import inspect as cli_inspect
from dreamfleet.cluster.cli import measure as cli_measure
from dreamfleet.cluster.cli import prepare as cli_prepare
from dreamfleet.cluster.cli import tags as cli_tags
from dreamfleet.cluster.cli.base import AsJson, Commands, Verbose, local_path, print_json, work
from dreamfleet.cluster.cli.pages import Browser, Port, serve

data = typer.Typer(
    name="data", cls=Commands, help="Prepare image sets.", no_args_is_help=True, rich_markup_mode=None
)


def label(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", parser=local_path, help="A folder of images.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=local_path,
            help="JSON file of the classes; an existing one is continued. Default: FOLDER/dataset.json.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[str, typer.Option(help="Names of the classes, from number 0 on.")] = "other,good",
    port: Port = 0,
    browser: Browser = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Label images on a local web page, for training the discriminator.

    Keys: a digit sets the class, a or left goes back, d or right skips, u undoes, n jumps to the next image without a
    class. Every answer is saved immediately; stop with Ctrl-C.
    """
    with work():
        from dreamfleet.cluster.labeling.labels import Labelling
        from dreamfleet.datasets.errors import UserError
        from dreamfleet.datasets.index.labels import LABELS_FILE

        names = [name.strip() for name in classes.split(",") if name.strip()]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"--classes {classes!r}: give at least two different names, such as other,good")
        labelling = Labelling(str(folder), str(out or folder / LABELS_FILE), names)
        serve(labelling, port=port, title="label the images", browser=browser)
        found = labelling.report()
    _print(found, as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    counts = ", ".join(f"{name} {count}" for name, count in found["classes"].items())
    print(f"labels     {found['labels']}")
    print(f"labelled   {found['labelled']} of {found['pictures']} images: {counts}")
    for reason in found["unreadable"].values():
        print(f"unreadable {reason}")


for command in (
    cli_inspect.inspect,
    cli_browse.browse,
    cli_prepare.prepare,
    cli_tags.tags,
    cli_caption.caption,
    cli_measure.measure,
    cli_cache.cache,
    label,
):
    data.command()(command)
