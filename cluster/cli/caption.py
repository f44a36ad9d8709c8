"""The command `data caption`: tags images with a model."""

from __future__ import annotations

from typing import Annotated

import typer

from dreamfleet.cluster.cli.base import AsJson, CaptionColumn, Verbose, counting, print_json, work


def caption(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of images, local or s3://.")],
    tagger: Annotated[
        str,
        typer.Option(
            help="WD tagger: folder with model.onnx and selected_tags.csv, the .onnx file, or a hub name.",
            show_default=False,
        ),
    ],
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
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    out: Annotated[
        str | None, typer.Option(help="Write the captions into this folder.", show_default=False)
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write the captions beside the images.")
    ] = False,
    caption_column: CaptionColumn = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Caption images with the WD 1.4 tagger.

    Writes a .txt file of Danbooru tags for each image; rerunning the command continues. Needs pip install
    'dreamfleet[tag]'.
    """
    with work(), counting("images") as progress:
        from dreamfleet.datasets.errors import DataError
        from dreamfleet.trainers.models.vision.wd_tagger import Tagger, Tagging, caption_folder

        if (out is not None) == in_place:
            raise DataError(
                "choose where captions are written: --in-place (beside the images) or --out FOLDER"
            )
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
        print(f"skipped    {name}: {reason}")
    if made.backup:
        print(f"backup     {made.backup}")
