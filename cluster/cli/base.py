"""Shared parts of the `dreamfleet` commands: error handling, exit codes, common options, printing."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes
SECONDS_BETWEEN_LINES = 10.0


class Commands(TyperGroup):
    """Reports an error as one message and an exit code; prints the traceback only with --verbose."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from dreamfleet.datasets.errors import RunFailed, UserError

        try:
            return super().invoke(ctx)
        except UserError as error:
            _report(ctx, f"dreamfleet: {error}")
            raise typer.Exit(USER_ERROR) from error
        except RunFailed as error:
            _report(ctx, f"dreamfleet: the run failed: {error}")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            _report(ctx, "dreamfleet: interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:  # `dreamfleet config R | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing reads the rest of the buffer
            raise typer.Exit(0) from error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.startswith(
                ("typer", "click")
            ):  # a wrong option: typer reports it with exit code 2
                raise
            _report(ctx, f"dreamfleet: {type(error).__name__}: {error}\n(--verbose prints the traceback)")
            raise typer.Exit(FAILED) from error


app = typer.Typer(
    name="dreamfleet",
    cls=Commands,
    help="Personalise Stable Diffusion on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich takes a third of a second
)


def _set_verbose(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.meta["dreamfleet.verbose"] = True
    return value


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"dreamfleet {version('dreamfleet')}")
        raise typer.Exit


def local_path(text: str | Path) -> Path:
    """Return an argument as a local path. Raises BadParameter for a URL, which would become a folder named s3:."""
    if "://" in str(text):
        raise typer.BadParameter(f"{text} is an address; give a path on this machine")
    return Path(text)


RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe (YAML file), local or s3://.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Values that override the recipe's.", show_default=False),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Head node of a Ray cluster, HOST:6379. Default: RAY_ADDRESS, else a private Ray on this machine.",
        show_default=False,
    ),
]
Shared = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FOLDER",
        help="A folder that all machines of the cluster mount under this path; repeatable.",
        show_default=False,
    ),
]
SetArgument = Annotated[
    str,
    typer.Argument(metavar="SET", help="Image set: a folder, local or s3://, or what a source reads."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size of the models.")]
ModelWorkers = Annotated[int, typer.Option(min=0, help="Number of workers on a cluster; 0 chooses it.")]
CaptionColumn = Annotated[
    str | None,
    typer.Option(
        help="Caption column of metadata.jsonl, .csv or .parquet. Default: text, caption or prompt.",
        show_default=False,
    ),
]
Continue = Annotated[
    bool,
    typer.Option(
        "--continue",
        help="Start, or continue what output_dir holds if its settings are equal; wait for another owner.",
    ),
]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="Take output_dir from the process that owns it, which ends at its next write, and continue.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show tracebacks.", callback=_set_verbose, is_eager=True)
]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    verbose: Verbose = False,
) -> None:
    pass


@contextmanager
def work() -> Iterator[None]:
    """Redirect stdout to stderr while a command works, so that stdout carries its results only; log to stderr."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    project = logging.getLogger("dreamfleet")
    project.addHandler(handler)
    project.setLevel(logging.INFO)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        project.removeHandler(handler)


@contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function (done, total) that shows progress, rate and time left on stderr.

    A bar on a terminal; otherwise a line every ten seconds, and one at the end of work that took longer. What was done
    before, the first call's number, does not count for the rate.
    """
    bar: Any = None
    last = began = time.monotonic()
    first: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar, last, first
        first = done if first is None else first
        if sys.stderr.isatty():
            if bar is None:
                from tqdm import tqdm

                bar = tqdm(total=total, initial=first, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True)
            bar.total = total
            bar.update(done - bar.n)
            return
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or (done == total and now - began >= SECONDS_BETWEEN_LINES):
            last = now
            pace = pace_text(done - first, total - done, now - began)
            print(f"{done} of {total} {unit}{pace}", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def pace_text(done: int, left: int, seconds: float) -> str:
    """Return the rate and the time left of work as text, such as `, 61.0 per second, 27 min left`."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    text = f", {rate:.1f} per second" if rate >= 1 else f", {1 / rate:.1f} s each"
    minutes = left / rate / 60
    if not left:
        return text
    if minutes < 1:
        return f"{text}, less than a minute left"
    return f"{text}, {minutes:.0f} min left" if minutes < 120 else f"{text}, {minutes / 60:.1f} h left"


def _report(ctx: typer.Context, message: str) -> None:
    if ctx.meta.get("dreamfleet.verbose") or os.environ.get("DREAMFLEET_VERBOSE"):
        traceback.print_exc(file=sys.stderr)
    print(message, file=sys.stderr)


def resume_command(name: str, recipe: str, overrides: Sequence[str] | None) -> str:
    """Return the command that continues an interrupted run or search."""
    command = " ".join([f"dreamfleet {name}", recipe, *(overrides or ()), "--resume"])
    from dreamfleet.cluster.jobs.job import RESUME_WITH

    return os.environ.get(RESUME_WITH, command)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    from dreamfleet.datasets.json_text import json_text

    print(json_text(value, indent=1, default=str))


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as a dictionary."""
    import dataclasses

    return dataclasses.asdict(value)


def name_of(place: str) -> str:
    """Return the last part of the path or address of a set, which names it on a page."""
    return place.rstrip("/").rpartition("/")[2] or place
