"""The command `data measure`: columns about images, for filters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

import typer

from dreamfleet.cluster.cli.base import (
    Address,
    AsJson,
    BatchSize,
    ModelWorkers,
    SetArgument,
    Shared,
    Verbose,
    counting,
    print_json,
    work,
)


def measure(
    source: SetArgument,
    out: Annotated[
        str | None,
        typer.Option(
            help="Parquet table; an existing one gets more columns. Default: columns of the set, for data.where.",
            show_default=False,
        ),
    ] = None,
    classifier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER[:LABEL]",
            help="Probability of a label, by an image classifier of transformers, such as "
            "watermark=detector:watermark; repeatable.",
            show_default=False,
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER[:LABEL]",
            help="Number of objects of a label, by an object detector of transformers, such as faces=yolos:face; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Least probability of a counted object.")] = 0.5,
    blur: Annotated[
        bool, typer.Option("--blur/--no-blur", help="Variance of the Laplacian; low is blurred.")
    ] = True,
    batch_size: BatchSize = 8,
    workers: ModelWorkers = 0,
    address: Address = None,
    shared: Shared = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure images: blur, and scores of local models (aesthetics, watermarks, faces).

    The columns are stored beside the set, so that recipes can filter by them, such as data.where: "blur > 100", or in
    a table of their own with --out. Rerunning the command continues.
    """
    with work(), counting("images") as progress:
        from dreamfleet.datasets.errors import DataError
        from dreamfleet.datasets.tools.annotate import Describe
        from dreamfleet.datasets.tools.measure import (
            BLUR,
            measure_blur,
            measure_set,
            parse_model,
            refuse_names,
        )
        from dreamfleet.trainers.driver.data_workers import data_workers

        made_by: list[tuple[str, Callable[[], Describe]]] = [(BLUR, measure_blur)] if blur else []
        places = []
        if classifier or detector:
            from dreamfleet.trainers.models.vision.image_scores import Classifier, Detector

            for text in classifier or []:
                name, place, label = parse_model(text, option="--classifier")
                made_by.append((name, functools.partial(Classifier, place, label)))
                places.append(place)
            for text in detector or []:
                name, place, label = parse_model(text, option="--detector")
                made_by.append((name, functools.partial(Detector, place, label, threshold)))
                places.append(place)
        if not made_by:
            raise DataError("nothing to measure: give --classifier or --detector, or leave out --no-blur")
        refuse_names([name for name, _ in made_by])
        reads = {"SET": [source], "model": places}
        with data_workers(
            address, reads=reads, writes={}, shared=shared or (), count=workers, model=bool(places)
        ) as here:
            made = measure_set(
                source, dict(made_by), out, workers=here, batch_size=batch_size, progress=progress
            )
    if as_json:
        print_json(made._asdict())
        return
    print(f"measured   {made.new} of {made.images} images")
    print(f"table      {made.table}")
    for name, values in made.columns.items():
        print(f"{name:<10} {', '.join(f'{step}: {value:g}' for step, value in values.items())}")
    for name, reason in made.failed.items():
        print(f"skipped    {name}: {reason}")
