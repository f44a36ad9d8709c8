"""The command line `dreamfleet`: its commands, output and exit codes. Heavy imports are inside the commands.

Results go to stdout, the rest to stderr. Exit codes: 0 done, 1 the run failed, 2 an error of the user, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli import artifacts
from dreamfleet.cluster.cli import compare as cli_compare
from dreamfleet.cluster.cli import data as cli_data
from dreamfleet.cluster.cli import fleet as cli_fleet
from dreamfleet.cluster.cli import jobs as cli_jobs
from dreamfleet.cluster.cli import plan as cli_plan
from dreamfleet.cluster.cli import tune as cli_tune
from dreamfleet.cluster.cli.base import (
    INTERRUPTED,
    USER_ERROR,
    Address,
    AsJson,
    Continue,
    Overrides,
    RecipePath,
    Shared,
    TakeOver,
    Verbose,
    app,
    plain,
    print_json,
    resume_command,
    work,
)
from dreamfleet.cluster.cli.import_config import Imports, Maps, Out, Program, import_config


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in output_dir.")
    ] = False,
    continues: Continue = False,
    take_over: TakeOver = False,
    address: Address = None,
    shared: Shared = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train one run and print the paths of its images, artifacts and report."""
    with work():
        from dreamfleet.trainers.launch import fit

        result = fit(
            recipe,
            overrides=overrides or (),
            resume=resume,
            continues=continues,
            take_over=take_over,
            address=address,
            shared=shared or (),
        )
    _print_run(result.run_folder, result.summary, as_json)
    if result.summary.exit_reason == "interrupted":
        again = resume_command("train", recipe, overrides)
        print(
            f"interrupted at step {result.summary.steps}; a checkpoint is saved. Continue with: {again}",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED)


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check that a recipe can run, without training.

    Checks files and weights, runs a synthetic step and an export, and compares the resources with the cluster's.
    """
    with work():
        from dreamfleet.cluster.resources import check_resources
        from dreamfleet.trainers.driver.preflight import this_machine
        from dreamfleet.trainers.recipe import load_recipe
        from dreamfleet.trainers.run.dry_run import check_run

        loaded = load_recipe(recipe, overrides or [])
        device = "cuda" if loaded.scaling.use_gpu and "GPU" in this_machine() else "cpu"
        lines = [("recipe", True, str(recipe))]
        lines += [(line.name, line.ok, line.detail) for line in check_run(loaded, device=device)]
        lines.append(check_resources(loaded, address))
    if as_json:
        print_json([{"name": name, "ok": ok, "detail": detail} for name, ok, detail in lines])
    else:
        for name, ok, detail in lines:
            print(f"{'ok' if ok else 'FAILED':<7} {name:<12} {detail}")
    if failed := [name for name, ok, _ in lines if not ok]:
        print(f"dreamfleet: this recipe cannot run; failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(USER_ERROR)


def config(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe (YAML file), local or s3://.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    imports: Imports = None,
    out: Out = None,
    maps: Maps = None,
    program: Program = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Print the resolved recipe, without running it; or translate the config of another trainer into a recipe."""
    if imports:
        if recipe is not None:
            raise typer.BadParameter(
                f"{recipe}: with --import no recipe is read; override values when you train"
            )
        import_config(imports, out=out, maps=maps, program=program, as_json=as_json)
        return
    if recipe is None or out or maps or program:
        raise typer.BadParameter(
            "give a RECIPE, or --import FILE; --out, --map and --from belong to --import"
        )
    with work():
        from dreamfleet.trainers.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        print(loaded.to_yaml(), end="")


def methods(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """List the fine-tuning methods, including those of installed packages."""
    with work():
        from dreamfleet.trainers.config.method import METHODS

        rows = [
            {"name": name, "description": method.summary, "helper_of": method.helper_of}
            for name, method in sorted(METHODS.items(), key=lambda item: bool(item[1].helper_of))
        ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        helps = f"For {row['helper_of']}. " if row["helper_of"] else ""
        print(f"{row['name']:<20} {helps}{row['description']}")


def doctor(
    address: Address = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder or s3:// prefix in which every machine must be able to write.",
            show_default=False,
        ),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="The file of `ray up`, with which the number of machines is compared. Default: the head node's.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check what this machine, or a cluster, supports.

    With --address, compares the machines: versions, clocks, memory, GPUs, storage and the links between them.
    """
    with work():
        from dreamfleet.cluster.doctor import examine, read_expected

        found = examine(
            address, storage=storage, expected=read_expected(config_file) if config_file else None
        )
    if as_json:
        print_json([line._asdict() for line in found])
    else:
        for line in found:
            print(f"{line.state:<8} {line.name:<14} {line.detail}")
            if line.remedy:
                print(f"{'':<23} -> {line.remedy}")
    if any(line.state == "MISSING" for line in found):
        raise typer.Exit(USER_ERROR)


for command in (
    train,
    cli_tune.tune,
    cli_fleet.fleet,
    cli_compare.compare,
    artifacts.sample,
    artifacts.score,
    cli_plan.plan,
    check,
    config,
    artifacts.export,
    artifacts.convert,
    methods,
    doctor,
    cli_jobs.jobs,
    cli_jobs.logs,
    cli_jobs.stop,
):
    app.command()(command)
app.add_typer(cli_data.data)
# Everything after `--` belongs to the submitted command, including options.
app.command(context_settings={"allow_interspersed_args": False})(cli_jobs.submit)


def main() -> None:
    """Run the command line (the entry point of the `dreamfleet` program)."""
    try:
        app()
    except SystemExit as error:
        if error.code == INTERRUPTED:
            # Threads that wait for workers would block the exit. Ray's processes end with this process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _print_run(folder: str, summary: Any, as_json: bool) -> None:
    from dreamfleet.datasets.storage.storage import Storage

    run = Storage(folder)
    images = [
        run.path("samples", name)
        for name in run.list("samples")
        if name.startswith("step-") and name.endswith(".png")
    ]
    artifacts = [run.path("exports", name) for name in summary.exports]
    report = run.path("report.html")
    if as_json:
        print_json(
            {
                "run_folder": folder,
                "exit_reason": summary.exit_reason,
                "pictures": images,
                "artefacts": artifacts,
                "report": report,
                "summary": plain(summary),
            }
        )
        return
    rows = [("run", folder), *[("images", path) for path in images[-1:]]]
    rows += [*[("artifact", path) for path in artifacts], ("report", report)]
    for name, path in rows:
        print(f"{name:<10} {path}")
