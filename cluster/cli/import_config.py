"""The options of `config --import`, which translates the config of another trainer into a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dreamfleet.cluster.cli.base import USER_ERROR, print_json, work

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE",
        help="Translate the config of another trainer into a recipe: kohya's TOML, the JSON of its GUI, of OneTrainer, "
        "SimpleTuner or the webui, ai-toolkit's YAML, or a pasted command line. Repeatable, for a config in several "
        "files; - reads the standard input.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="RECIPE",
        help="With --import: the file to write; prints the report instead of the recipe.",
        show_default=False,
    ),
]
Maps = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="OLD=NEW",
        help="With --import: replace the beginning of paths of another machine, as in 'D:\\train=/data/train'; "
        "repeatable.",
        show_default=False,
    ),
]
Program = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="PROGRAM",
        help="With --import: kohya, kohya-gui, onetrainer, simpletuner, ai-toolkit, diffusers or webui. Default: "
        "recognised by the keys.",
        show_default=False,
    ),
]


def import_config(
    files: list[str], *, out: Path | None, maps: list[str] | None, program: str | None, as_json: bool
) -> None:
    """Translate a config, and print or write the recipe. Exits with code 2 if something blocks the training."""
    with work():
        from dreamfleet.datasets.errors import UserError
        from dreamfleet.trainers.imports.translate import import_files

        if out is not None and out.exists():
            raise UserError(f"{out} exists already; give another --out, or remove it")
        imported = import_files(files, maps=maps or (), program=program)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(imported.text, encoding="utf-8")
    if as_json:
        print_json(imported.to_json())
    elif out is None:
        print(imported.text, end="")
    else:
        print(f"{out}: imported from {imported.title}; {len(imported.lines)} values")
        print("\n".join(imported.report()))
    if blocking := imported.blocking:
        names = ", ".join(entry.key for entry in blocking)
        print(f"dreamfleet: this recipe cannot run yet: {names} (see the report)", file=sys.stderr)
        raise typer.Exit(USER_ERROR)
