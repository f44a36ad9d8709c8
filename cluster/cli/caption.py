"""The command that tags pictures with a model: data caption."""

from __future__ import annotations

from typing import Annotated

import typer

from dreamfleet.cluster.cli.base import AsJson, CaptionColumn, Verbose, counting, print_json, work


def caption(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of pictures, here or s3://.")],
    tagger: Annotated[
        str,
        typer.Option(
            help="WD tagger: folder of model.onnx and selected_tags.csv, the .onnx file, or a hub name.",
            show_default=False,
        ),
    ],
    threshold: Annotated[float, typer.Option(help="Probability a general tag needs.")] = 0.35,
    character_threshold: Annotated[float, typer.Option(help="Probability a character's tag needs.")] = 0.85,
    rating: Annotated[bool, typer.Option("--rating", help="The likeliest rating too.")] = False,
    add: Annotated[
        list[str] | None, typer.Option(help="A tag for every picture; repeatable.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A tag, as red_hair, never used; repeatable.", show_default=False)
    ] = None,
    existing: Annotated[
        str, typer.Option(help="Captions there: ignore, replace, append, prepend.")
    ] = "ignore",
    sort: Annotated[bool, typer.Option("--sort", help="By alphabet; else the likeliest first.")] = False,
    confidence: Annotated[bool, typer.Option("--confidence", help="Write (tag:0.987).")] = False,
    spaces: Annotated[
        bool, typer.Option("--spaces/--underscores", help="red hair or red_hair; faces such as >_< stay.")
    ] = True,
    escape: Annotated[bool, typer.Option("--escape-brackets", help=r"( becomes \(.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures judged together.")] = 8,
    out: Annotated[
        str | None, typer.Option(help="Write captions into this folder.", show_default=False)
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write them beside the pictures.")] = False,
    caption_column: CaptionColumn = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Caption pictures with the WD 1.4 tagger.

    A .txt file of Danbooru tags for each. The same again goes on where it stopped. Needs pip install 'dreamfleet[tag]'.
    """
    with work(), counting("pictures") as progress:
        from dreamfleet.datasets.errors import DataError
        from dreamfleet.trainers.models.vision.wd_tagger import Tagger, Tagging, caption_folder

        if (out is not None) == in_place:
            raise DataError("say where captions go: --in-place (beside the pictures) or --out FOLDER")
        lists = {"add": tuple(add or ()), "exclude": tuple(exclude or ())}
        written = {"sort": sort, "confidence": confidence, "spaces": spaces, "escape": escape}
        how = Tagging(threshold, character_threshold, rating, existing=existing, **lists, **written)  # type: ignore[arg-type] # two kinds of values
        made = caption_folder(
            folder,
            Tagger(tagger),
            how,
            out=out,
            batch_size=batch_size,
            progress=progress,
            caption_column=caption_column,
        )
    if as_json:
        print_json(made._asdict())
        return
    print(f"captioned  {len(made.captions)}; {made.skipped} had a caption")
    for name, reason in made.failed.items():
        print(f"left out   {name}: {reason}")
    if made.backup:
        print(f"before     {made.backup}")
