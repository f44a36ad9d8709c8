"""The command `fleet`: one run for each subject of a table."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli.base import (
    FAILED,
    INTERRUPTED,
    Address,
    AsJson,
    Continue,
    Overrides,
    RecipePath,
    Shared,
    TakeOver,
    Verbose,
    print_json,
    resume_command,
    work,
)

SHOWN = 20  # failed subjects on stdout; the table contains all

SubjectsPath = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECTS",
        help="A table of subjects: csv, tsv, jsonl, parquet or YAML, local or s3://.",
        show_default=False,
    ),
]


def fleet(
    subjects: SubjectsPath,
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the fleet in output_dir, with new rows if there are any."),
    ] = False,
    continues: Continue = False,
    take_over: TakeOver = False,
    address: Address = None,
    shared: Shared = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train many subjects, each with its own model, LoRA or embedding, from one table.

    Columns: name, images (a folder or a list), prompt, class_prompt, priority, and any recipe key. Each subject is a
    run in output_dir/subjects/NAME. Writes fleet.parquet and index.html. Subjects that fail do not stop the others: the
    exit code is 1 only if all failed.
    """
    with work():
        from dreamfleet.tune.fleet.fleet import fleet as train_fleet

        result = train_fleet(
            subjects,
            recipe,
            overrides=overrides or (),
            resume=resume,
            continues=continues,
            take_over=take_over,
            address=address,
            shared=shared or (),
        )
    if as_json:
        print_json(to_plain(result))
    else:
        _print_result(result)
    again = resume_command(f"fleet {subjects}", recipe, overrides)
    if result.exit_reason == "interrupted":
        _note(f"interrupted; every running subject has a checkpoint. Continue with: {again}")
        raise typer.Exit(INTERRUPTED)
    if result.exit_reason == "limit":
        _note(
            f"{result.remaining} subjects are left (fleet.max_subjects or max_hours). Continue with: {again}"
        )
    if result.failed:
        _note(f"{result.failed} of {result.total} subjects failed. To try them again: {again}")
    if result.failed == result.total:
        raise typer.Exit(FAILED)


def to_plain(result: Any) -> dict[str, Any]:
    """Return a FleetResult as plain data, with the reasons of the failed subjects; the table holds all rows."""
    names = ("exit_reason", "folder", "total", "completed", "failed", "remaining", "seconds", "table", "page")
    return {
        **{name: getattr(result, name) for name in names},
        "reasons": {row.name: row.reason for row in result.rows if row.status == "failed"},
    }


def _print_result(result: Any) -> None:
    for name in ("folder", "page", "table"):
        print(f"{name:<10} {getattr(result, name)}")
    print(f"{'completed':<10} {result.completed} of {result.total}")
    if not result.failed:
        return
    print(f"{'failed':<10} {result.failed}\n")
    shown = 0
    for row in result.rows:
        if row.status == "failed":
            if shown == SHOWN:
                print(f"and {result.failed - SHOWN} more: see {result.table}")
                break
            shown += 1
            print(f"row {row.row}  {row.name}  {(row.reason or '').splitlines()[0]}")


def _note(text: str) -> None:
    print(text, file=sys.stderr)
