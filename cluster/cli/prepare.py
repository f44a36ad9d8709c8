"""The command `data prepare`: crops and resizes image sets."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli.base import (
    Address,
    AsJson,
    CaptionColumn,
    Shared,
    Verbose,
    counting,
    print_json,
    work,
)

SHOWN = 20


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="Image set: a folder, local or s3://, or what another source reads; not changed.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="New folder, local or s3://.")],
    size: Annotated[str, typer.Option(help="Side in pixels, or WIDTHxHEIGHT.")] = "512",
    mode: Annotated[str, typer.Option(help="crop, smart, focal, fit, pad, buckets or auto.")] = "crop",
    focus: Annotated[
        str, typer.Option(help="Crop position of buckets and auto: center, smart or focal.")
    ] = "center",
    fill: Annotated[
        str, typer.Option(help="Filling of pad: a colour (white, #808080), edge or blur.")
    ] = "white",
    flip: Annotated[bool, typer.Option("--flip", help="Also write a mirrored copy of each image.")] = False,
    split_oversized: Annotated[
        bool, typer.Option("--split-oversized", help="Split elongated images into several.")
    ] = False,
    split_threshold: Annotated[
        float, typer.Option(help="Split if a crop would keep at most this fraction of the image.")
    ] = 0.5,
    overlap: Annotated[float, typer.Option(help="Overlap of neighbouring pieces, as a fraction.")] = 0.2,
    format: Annotated[str, typer.Option(help="png, jpg or webp.")] = "png",
    quality: Annotated[int, typer.Option(help="Quality of jpg and webp, 1 to 100.")] = 95,
    name: Annotated[
        str, typer.Option(help="Pattern of file names, with {stem}, {index:05d} and {suffix}.")
    ] = "{stem}",
    alpha: Annotated[str, typer.Option(help="Transparency becomes a mask file (mask) or white.")] = "mask",
    mask_dir: Annotated[
        str | None, typer.Option(help="Folder of masks with the images' names.", show_default=False)
    ] = None,
    to: Annotated[str, typer.Option(help="Write a folder of files (folder) or shards (shards).")] = "folder",
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a shard in MB (2**20 bytes).")] = 256,
    shard_format: Annotated[str, typer.Option(help="Shards are tar (webdataset) or parquet.")] = "tar",
    workers: Annotated[int, typer.Option(min=0, help="Number of processes; 0: one per CPU core.")] = 0,
    address: Address = None,
    shared: Shared = None,
    caption_column: CaptionColumn = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Crop and resize images, together with their captions and masks, here or on a Ray cluster.

    crop: the centre. smart: by detail, skin tones and saturation. focal: by corners. fit: the whole image, without
    padding. pad: the whole image, padded. buckets: the size that training would choose. auto: the multiples of 64 that
    crop least. Rerunning the command continues where it stopped.
    """
    with work(), counting("images") as progress:
        from dreamfleet.datasets.images.crops import Cutting
        from dreamfleet.datasets.tools.prepare import prepare
        from dreamfleet.datasets.tools.prepare_options import Preparing
        from dreamfleet.trainers.driver.data_workers import data_workers

        cutting = Cutting(
            _size(size), mode, focus, fill, split_oversized, split_threshold=split_threshold, overlap=overlap
        )
        how = Preparing(cutting, format, quality, name, flip, alpha)
        shards = _shards(to, shard_format, shard_mb)
        reads = {"IN": [source], "--mask-dir": [mask_dir] if mask_dir else []}
        with data_workers(
            address, reads=reads, writes={"OUT": [target]}, shared=shared or (), count=workers
        ) as place:
            made = prepare(
                source,
                target,
                how,
                shards=shards,
                workers=place,
                mask_dir=mask_dir,
                progress=progress,
                caption_column=caption_column,
            )
    if as_json:
        print_json(made)
    else:
        _print(made["pictures"], target)


def _size(text: str) -> tuple[int, int]:
    from dreamfleet.datasets.errors import DataError

    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise DataError(f"--size {text!r}: write 512 or 640x512")
    return int(sides[0]), int(sides[-1])


def _shards(to: str, kind: str, megabytes: int) -> Any:
    from dreamfleet.datasets.errors import DataError
    from dreamfleet.datasets.tools.outputs import Shards

    if to not in ("folder", "shards"):
        raise DataError(f"--to {to!r}: write folder or shards")
    return Shards(kind, megabytes) if to == "shards" else None


def _print(images: dict[str, Any], target: str) -> None:
    outputs = [output for entry in images.values() for output in entry["outputs"]]
    enlarged = sum(output["scale"] > 1 for output in outputs)
    print(f"prepared   {len(outputs)} images from {len(images)} in {target}")
    if shards := {output["shard"] for output in outputs if "shard" in output}:
        print(f"shards     {len(shards)}")
    print(f"captions   {sum('caption' in output for output in outputs)}")
    print(f"masks      {sum('mask' in output for output in outputs)}")
    if enlarged:
        print(f"enlarged   {enlarged}")
    left_out = [(name, entry["reason"]) for name, entry in images.items() if "reason" in entry]
    for name, reason in left_out[:SHOWN]:
        print(f"skipped    {name}: {reason}")
    if len(left_out) > SHOWN:
        print(f"skipped    {len(left_out) - SHOWN} more (all with --json)")
    if not outputs:
        from dreamfleet.datasets.errors import DataError

        sys.stdout.flush()
        raise DataError(f"no image could be prepared into {target}")
