"""The command `data caption`: tags and describes images with models."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamfleet.cluster.cli.base import (
    Address,
    AsJson,
    BatchSize,
    CaptionColumn,
    ModelWorkers,
    SetArgument,
    Shared,
    Verbose,
    counting,
    print_json,
    work,
)

if TYPE_CHECKING:
    from dreamfleet.datasets.tools.captions import Composition
    from dreamfleet.trainers.models.vision.wd_tagger import Tagging


def caption(
    folder: SetArgument,
    tagger: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PLACE",
            help="WD tagger: folder with model.onnx and selected_tags.csv, the .onnx file, or a hub name; repeatable.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="Image-to-text or vision-language model of transformers (BLIP, Florence-2, Qwen-VL), local or s3://; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            help="Instruction for --model, or the beginning of BLIP's captions.", show_default=False
        ),
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest description of --model.")] = 128,
    template: Annotated[
        str,
        typer.Option(
            help="Caption of the models' names and {caption}, such as '{blip}, {wd}'. Default: all, with commas.",
            show_default=False,
        ),
    ] = "",
    block: Annotated[
        list[str] | None,
        typer.Option(
            help="Tag, word or phrase to remove; * is any characters; repeatable.", show_default=False
        ),
    ] = None,
    blocklist: Annotated[
        str | None, typer.Option(help="File of what to --block, one a line.", show_default=False)
    ] = None,
    threshold: Annotated[float, typer.Option(help="Least probability of a general tag.")] = 0.35,
    character_threshold: Annotated[float, typer.Option(help="Least probability of a character tag.")] = 0.85,
    rating: Annotated[bool, typer.Option("--rating", help="Also add the most likely rating.")] = False,
    add: Annotated[
        list[str] | None, typer.Option(help="A tag to add to every image; repeatable.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="A tag to leave out, such as red_hair; repeatable.", show_default=False),
    ] = None,
    existing: Annotated[
        str, typer.Option(help="Images with captions: ignore, replace, append or prepend.")
    ] = "ignore",
    sort: Annotated[
        bool, typer.Option("--sort", help="Sort alphabetically; default: most likely first.")
    ] = False,
    confidence: Annotated[bool, typer.Option("--confidence", help="Write (tag:0.987).")] = False,
    spaces: Annotated[
        bool,
        typer.Option(
            "--spaces/--underscores", help="red hair or red_hair; emoticons such as >_< are not changed."
        ),
    ] = True,
    escape: Annotated[bool, typer.Option("--escape-brackets", help=r"( becomes \(.")] = False,
    batch_size: BatchSize = 8,
    out: Annotated[
        str | None,
        typer.Option(
            help="Write the captions into this folder, or with .parquet into a table with a column for each model.",
            show_default=False,
        ),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write the captions beside the images.")
    ] = False,
    workers: ModelWorkers = 0,
    address: Address = None,
    shared: Shared = None,
    caption_column: CaptionColumn = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Caption images with WD taggers, and with image-to-text models of transformers.

    Writes a .txt file for each image, or a table; rerunning the command continues. On a Ray cluster, each worker loads
    the models. Taggers need pip install 'dreamfleet[tag]'.
    """
    with work(), counting("images") as progress:
        from dreamfleet.datasets.errors import DataError
        from dreamfleet.datasets.tools.caption_set import TABLE, caption_set
        from dreamfleet.trainers.driver.data_workers import data_workers
        from dreamfleet.trainers.models.vision.wd_tagger import Tagging

        if (out is not None) == in_place:
            raise DataError(
                "choose where captions are written: --in-place (beside the images), --out FOLDER or --out FILE.parquet"
            )
        tagging = Tagging(
            threshold,
            character_threshold,
            rating,
            add=tuple(add or ()),
            exclude=tuple(exclude or ()),
            sort=sort,
            confidence=confidence,
            spaces=spaces,
            escape=escape,
        )
        makers, places = _models(tagger or [], model or [], tagging, prompt, max_tokens)
        how = _composition(makers, tagger or [], template, block or [], blocklist, existing)
        local = [place for place in places if os.path.exists(place)]  # others are on the hub or in a bucket
        writes = {"--out": [out] if out and not out.endswith(TABLE) else []}
        with data_workers(
            address,
            reads={"SET": [folder], "model": local},
            writes=writes,
            shared=shared or (),
            count=workers,
            model=True,
        ) as here:
            made = caption_set(
                folder,
                makers,
                how,
                out=out,
                workers=here,
                batch_size=batch_size,
                caption_column=caption_column,
                progress=progress,
            )
    if as_json:
        print_json(made._asdict())
        return
    print(f"captioned  {len(made.captions)}; {made.skipped} had a caption")
    for name, reason in made.failed.items():
        print(f"skipped    {name}: {reason}")
    if made.backup:
        print(f"backup     {made.backup}")


def _models(
    taggers: list[str], models: list[str], tagging: Tagging, prompt: str, max_tokens: int
) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Return what loads each model, by name, and the models' places. Raises UserError for an unusable one."""
    from dreamfleet.datasets.errors import DataError

    options = {"prompt": prompt, "max_tokens": max_tokens}
    named = [(*_named(text), True) for text in taggers] + [(*_named(text), False) for text in models]
    makers: dict[str, Callable[[], Any]] = {}
    for name, place, is_tagger in named:
        if name in makers:
            raise DataError(f"two models are named {name}: write NAME=FOLDER, such as {name}2={place}")
        if is_tagger:
            from dreamfleet.trainers.models.vision.wd_tagger import tagger_of

            makers[name] = functools.partial(tagger_of, place, tagging)
        else:
            from dreamfleet.trainers.models.vision.captioner import Captioner

            makers[name] = functools.partial(Captioner, place, **options)  # type: ignore[arg-type] # two kinds of values
    if not makers:
        raise DataError("no model: give --tagger, --model, or both")
    return makers, [place for _, place, _ in named]


def _composition(
    makers: dict[str, Callable[[], Any]],
    taggers: list[str],
    template: str,
    block: list[str],
    blocklist: str | None,
    existing: str,
) -> Composition:
    from dreamfleet.datasets.storage.storage import read_text
    from dreamfleet.datasets.tools.captions import Composition, read_blocklist

    if blocklist:
        place = blocklist if "://" in blocklist else os.path.abspath(blocklist)
        block = [*block, *read_blocklist(read_text(place))]
    tags = frozenset(_named(text)[0] for text in taggers)
    return Composition(tuple(makers), tags, template, tuple(block), existing)


def _named(text: str) -> tuple[str, str]:
    """Return name and place of `[NAME=]PLACE`; the name is that of the folder by default."""
    name, found, place = text.partition("=")
    if found and name and "/" not in name:
        return name, place
    path = PurePath(text.removesuffix("/model.onnx"))
    made = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem if path.suffix == ".onnx" else path.name).strip("-")
    return (made if made[:1].isalpha() else f"m{made}"), text
