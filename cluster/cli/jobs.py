"""The commands for jobs on a cluster: submit, jobs, logs, stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamfleet.cluster.cli.base import INTERRUPTED, AsJson, Shared, Verbose, print_json, work
from dreamfleet.cluster.cli.job_lines import end_of, plain_job, queued_row, row_of

if TYPE_CHECKING:
    from dreamfleet.cluster.jobs.client import JobServer
    from dreamfleet.cluster.jobs.job import Job

COMMANDS = ("train", "tune", "fleet", "data cache")

ServerAddress = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of the head node, http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, else this machine's.",
        show_default=False,
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="ID of a job, as listed by `dreamfleet jobs`.")]
Command = Annotated[
    list[str],
    typer.Argument(
        metavar="COMMAND",
        help="-- train|tune|data cache RECIPE [KEY.PATH=VALUE ...] [--resume], or -- fleet SUBJECTS RECIPE ...",
        show_default=False,
    ),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY[=VALUE]",
        help="An environment variable for the job; KEY alone copies this shell's. No secrets: Ray displays and logs "
        "it. "
        "Repeatable.",
        show_default=False,
    ),
]


def submit(
    ctx: typer.Context,
    command: Command,
    address: ServerAddress = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's output; exit with the run's exit code.")
    ] = False,
    many: Annotated[
        bool,
        typer.Option(
            "--many",
            help="Queue the runs of several recipes: --many RECIPE ... [KEY.PATH=VALUE ...] [--priority N] "
            "[--max-running N] [--queue FOLDER].",
        ),
    ] = False,
    shared: Shared = None,
    env: Variables = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Submit a run to a cluster and print the job's ID.

    Sends the installed dreamfleet, the resolved recipe, and the local images, models and other files that it names, up
    to 200 MiB. s3:// URLs and paths under --shared are used as they are. output_dir must be one of those, because the
    run outlives the cluster. Submit the same again to continue from the newest checkpoint; other settings in the same
    output_dir are refused, unless --resume allows them.

    With --many, the runs wait in a queue on the cluster, by default in the folder `queue` beside the first output_dir.
    A run starts when all its workers fit, the highest --priority first, and at most --max-running of these runs at
    once. A run of higher priority that finds no room makes others save and return to the queue. Submit the same again
    to change the priority, or to continue runs that ended.
    """
    if many:
        from dreamfleet.cluster.cli.many import submit_many

        job_id = submit_many(command, address, shared=shared or (), env=env or (), as_json=as_json)
        if follow:
            _follow(address, job_id)
        return
    name, parsed, options = _parse(ctx, command)
    recipe, overrides = parsed["recipe"], parsed["overrides"] or []
    with work():
        import os

        from dreamfleet.cluster.jobs.check_versions import check_cluster
        from dreamfleet.cluster.jobs.client import job_server
        from dreamfleet.cluster.jobs.package import check_here, pack
        from dreamfleet.cluster.jobs.package_fleet import SUBJECTS_FILE, pack_fleet
        from dreamfleet.cluster.jobs.submit import find_equal, read_environment, send
        from dreamfleet.trainers.recipe import load_recipe

        environment = read_environment(env or (), os.environ)
        known: dict[str, Any] = {"shared": shared or (), "resume": "--resume" in options}
        if name == "fleet":
            package = pack_fleet(parsed["subjects"], recipe, overrides, **known)
            loaded, name = package.recipe, f"fleet {SUBJECTS_FILE}"
        else:
            loaded = load_recipe(recipe, overrides)
            makes_cache = name == "data cache"
            package = pack(loaded, makes_cache=makes_cache, **known)
            check_here(loaded, makes_cache=makes_cache)
        if name != "tune" and loaded.scaling.is_local:
            _print_note(
                "scaling.num_workers is 0: the run trains on the head node itself; set 1 or more to use workers"
            )
        options += _ownership(name, options)
        with job_server(address) as server:
            same = None if "--take-over" in options else find_equal(server.jobs(), package, what=name)
            if same is None:
                check_cluster(server, _print_note)
                for folder in shared or ():  # the job also treats these folders as shared
                    options += ["--shared", folder]
                job_id = send(
                    server,
                    package,
                    [name, *options],
                    typed=command,
                    environment=environment,
                    report=_print_note,
                )
    job_id = job_id if same is None else same.id
    if as_json:
        print_json({"id": job_id, "address": server.address, "output_dir": loaded.output_dir})
    else:
        print(job_id, flush=True)
    done = "submitted" if same is None else "not sent: this job trains the same already"
    _print_note(
        f"{done}. Follow it with: dreamfleet logs {job_id} --follow; stop it with: dreamfleet stop {job_id}"
    )
    if follow:
        _follow(address, job_id)


def jobs(address: ServerAddress = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """List the jobs of a cluster."""
    with work():
        from dreamfleet.cluster.cli.many import read_queues
        from dreamfleet.cluster.jobs.client import job_server

        with job_server(address) as server:
            found = server.jobs()
            queues = read_queues(server, found)
    known = {job.id for job in found}
    waiting = [
        entry
        for entries in queues.values()
        for entry in entries
        if entry["state"] == "WAITING" or entry["job"] not in known
    ]
    if as_json:
        print_json([*(plain_job(job) for job in found), *waiting])
        return
    rows = [
        ("ID", "STATE", "STARTED", "TIME", "COMMAND", "OUTPUT_DIR"),
        *map(row_of, found),
        *map(queued_row, waiting),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    last = {job.metadata["output_dir"]: job for job in found}
    for job in last.values():  # failed jobs that were not resumed
        if job.reason:
            _print_note(end_of(job))


def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", help="Continue until the job ends; exit with its exit code.")
    ] = False,
    address: ServerAddress = None,
    verbose: Verbose = False,
) -> None:
    """Print the output of a job."""
    if follow:
        _follow(address, job_id, to_stdout=True)
        return
    with work():
        from dreamfleet.cluster.jobs.client import job_server

        with job_server(address) as server:
            text, job = server.logs(job_id), server.job(job_id)
    print(text, end="", flush=True)
    if job.reason:
        _print_note(end_of(job))


def stop(job_id: JobId, address: ServerAddress = None, verbose: Verbose = False) -> None:
    """Stop a job after it has saved a checkpoint, and wait for it.

    The job ends after the current step. Ray kills it if it is still running after 15 minutes.
    """
    with work():
        from dreamfleet.cluster.cli.many import stop_queued
        from dreamfleet.cluster.jobs.client import job_server

        with job_server(address) as server:
            state = stop_queued(server, job_id) or _stop(server, job_id)
    print(f"{job_id} {state}")


def _stop(server: JobServer, job_id: str) -> str:
    job = server.job(job_id)
    if not job.is_over:
        printed = len(server.logs(job_id))
        server.stop(job_id)
        _print_note(f"stopping {job_id} after its checkpoint")
        job = _watch(server, job_id, sys.stderr, skip=printed)
    return job.state


def _ownership(name: str, options: Sequence[str]) -> list[str]:
    """Return the option by which a job continues what its output_dir holds, if its settings are equal."""
    given = {"--resume", "--continue", "--take-over"} & set(options)
    return ["--continue"] if name.partition(" ")[0] in ("train", "tune", "fleet") and not given else []


def _parse(ctx: typer.Context, command: list[str]) -> tuple[str, dict[str, Any], list[str]]:
    """Parse ``train RECIPE key=value --option`` as that command would: (name, parameters, options)."""
    from dreamfleet.datasets.errors import RecipeError

    length = 2 if command[0] == "data" else 1
    name, rest = " ".join(command[:length]), command[length:]
    assert ctx.parent is not None
    target: Any = ctx.parent.command
    if name not in COMMANDS:
        raise RecipeError(
            f"submit {name}: a job can train or tune a recipe, train a fleet, or make a cache: "
            "dreamfleet submit -- train RECIPE"
        )
    for part in name.split():
        target = target.commands[part]
    parsed = target.make_context(f"dreamfleet submit -- {name}", list(rest))
    options: list[str] = []
    for parameter in target.params:
        source = parsed.get_parameter_source(parameter.name)
        if parameter.param_type_name != "option" or source is None or source.name != "COMMANDLINE":
            continue
        if parameter.name == "address":
            raise RecipeError(
                "--address after `--`: the job runs on the cluster it is submitted to; give --address before the `--`"
            )
        value = parsed.params[parameter.name]
        for one in value if parameter.multiple else [value]:
            options += [parameter.opts[0], *([] if parameter.is_flag else [str(one)])]
    return name, parsed.params, options


def _follow(address: str | None, job_id: str, *, to_stdout: bool = False) -> None:
    """Print a job's output until it ends, then exit with its exit code; Ctrl-C does not stop the job."""
    out = sys.stdout if to_stdout else sys.stderr
    try:
        with work():
            from dreamfleet.cluster.jobs.client import job_server

            with job_server(address) as server:
                job = _watch(server, job_id, out)
    except KeyboardInterrupt:
        _print_note(
            f"\nno longer following {job_id}, which keeps running. Follow it with: dreamfleet logs {job_id} --follow; "
            f"stop it with: dreamfleet stop {job_id}"
        )
        raise typer.Exit(INTERRUPTED) from None
    _print_note(end_of(job))
    if job.exit_code:
        raise typer.Exit(job.exit_code)


def _watch(server: JobServer, job_id: str, out: Any, *, skip: int = 0) -> Job:
    def write(text: str) -> None:
        out.write(text)
        out.flush()

    return server.follow(job_id, write, skip=skip)


def _print_note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
