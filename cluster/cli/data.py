"""The commands `dreamfleet data ...`: what is done with pictures before a run learns from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli import cache as cli_cache
from dreamfleet.cluster.cli import caption as cli_caption
from dreamfleet.cluster.cli import inspect as cli_inspect
from dreamfleet.cluster.cli import prepare as cli_prepare
from dreamfleet.cluster.cli import tags as cli_tags
from dreamfleet.cluster.cli.base import AsJson, Commands, Verbose, local_path, print_json, work

data = typer.Typer(
    name="data", cls=Commands, help="Sets of pictures.", no_args_is_help=True, rich_markup_mode=None
)


def label(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", parser=local_path, help="A folder of pictures.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=local_path,
            help="The JSON of classes, gone on with when there; else FOLDER/dataset.json.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[str, typer.Option(help="Names of the classes, from number 0 on.")] = "other,good",
    port: Annotated[int, typer.Option(help="Port of the page; 0: any that is free.", min=0, max=65535)] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Give pictures their classes on a local page, for the discriminator to learn from.

    Keys: a digit is the class, a or left goes back, d or right skips, u undoes, n finds the next one without a class.
    Every answer is saved at once; Ctrl-C ends it.
    """
    with work():
        from dreamfleet.cluster.labeling.labels import Labelling
        from dreamfleet.cluster.labeling.server import LabelServer
        from dreamfleet.datasets.errors import UserError
        from dreamfleet.datasets.index.labels import LABELS_FILE

        names = [name.strip() for name in classes.split(",") if name.strip()]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"--classes {classes!r}: give two different names or more, such as other,good")
        labelling = Labelling(str(folder), str(out or folder / LABELS_FILE), names)
        server = LabelServer(labelling, port)
        print(
            f"label the pictures at {server.url}\nCtrl-C ends it; every answer is saved at once", flush=True
        )
        if browser:
            _open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
        found = labelling.report()
    _print(found, as_json)


def _open(url: str) -> None:
    """Open the page where there is a desktop; elsewhere a browser would take over the terminal."""
    import webbrowser

    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    counts = ", ".join(f"{name} {count}" for name, count in found["classes"].items())
    print(f"labels     {found['labels']}")
    print(f"labelled   {found['labelled']} of {found['pictures']} pictures: {counts}")
    for reason in found["unreadable"].values():
        print(f"unreadable {reason}")


for command in (
    cli_inspect.inspect,
    cli_prepare.prepare,
    cli_tags.tags,
    cli_caption.caption,
    cli_cache.cache,
    label,
):
    data.command()(command)
