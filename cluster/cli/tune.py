"""The command `tune`: a search over recipe keys."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli.base import (
    INTERRUPTED,
    Address,
    AsJson,
    Continue,
    Overrides,
    RecipePath,
    Shared,
    TakeOver,
    Verbose,
    plain,
    print_json,
    resume_command,
    work,
)

SHOWN = 5  # trials in the table on stdout; the files contain all


def tune(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search in output_dir.")] = False,
    continues: Continue = False,
    take_over: TakeOver = False,
    address: Address = None,
    shared: Shared = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search over recipe keys with many short runs, configured by the recipe's search: section.

    Writes best.yaml, a recipe for `dreamfleet train`, trials.parquet and report.html.
    """
    with work():
        from dreamfleet.tune.search import search

        result = search(
            recipe,
            overrides=overrides or (),
            resume=resume,
            continues=continues,
            take_over=take_over,
            address=address,
            shared=shared or (),
        )
    if as_json:
        print_json(plain(result))
    else:
        _print_result(result)
    if result.exit_reason == "interrupted":
        again = resume_command("tune", recipe, overrides)
        print(f"interrupted; the search is saved. Continue with: {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


def _print_result(result: Any) -> None:
    from dreamfleet.trainers.report import formatting
    from dreamfleet.tune.trial_store import format_value

    for name, path in (
        ("search", result.folder),
        ("best", result.best_recipe),
        ("trials", result.table),
        ("report", result.report),
    ):
        if path is not None:
            print(f"{name:<10} {path}")
    shown = result.trials[:SHOWN]
    if not shown:
        return
    keys = list(shown[0].point)
    table = [["trial", *(key.rpartition(".")[2] for key in keys), *result.metrics, "steps", "time", ""]]
    for trial in shown:
        values = [trial.figure(name) for name in result.metrics]
        table.append(
            [
                trial.name,
                *(format_value(trial.point[key]) for key in keys),
                *("" if value is None else formatting.number(value, 4) for value in values),
                str(trial.steps),
                formatting.seconds(trial.seconds),
                trial.status,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
