"""Submits a run to a cluster as a Ray job: entrypoint, environment and metadata."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dreamfleet.cluster.jobs.client import JobServer
from dreamfleet.cluster.jobs.code import write_code
from dreamfleet.cluster.jobs.job import AGAIN, OURS, RESUME_WITH, SETTINGS, Job, make_resume_command
from dreamfleet.cluster.jobs.keep import QUEUE
from dreamfleet.cluster.jobs.package import MIB, RECIPE_FILE, START_FILE, Package, start_script
from dreamfleet.cluster.jobs.queue import Entry
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.config.differences import describe_differences

# Seconds from Ray's SIGTERM, after which a run saves and ends, to SIGKILL; Ray's default of 3 is less than a
# step.
STOP_SECONDS = 900
QUEUE_KEY = "queue"  # key in the metadata of a queue's job: its folder
ADDED = "added"  # folder in the package of a queue's job: the runs to add
OWNER = "DREAMFLEET_OWNER"  # the name by which a job holds its run: its ID, also after its driver was started again
ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),  # read by the job's supervisor
    "TQDM_DISABLE": "1",  # a progress bar would add a line to the log at each update
}


def send(
    server: JobServer,
    package: Package,
    command: Sequence[str],
    *,
    typed: Sequence[str],
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> str:
    """Upload code and package, start ``dreamfleet COMMAND`` on the cluster, and return the job's ID.

    ``command`` is ``train``, ``tune``, ``fleet SUBJECTS`` or ``data cache``, with its options; ``typed`` is the user's
    command, which `dreamfleet jobs` shows. ``environment`` is set for the job and its workers in addition to
    :data:`ENVIRONMENT`; its values are not printed.
    """
    job_id = make_job_id(package.recipe.run_name)
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
        code, inputs = write_code(Path(folder)), package.write(Path(folder))
        report(
            f"sending the code and the recipe with {len(package.files)} files ({inputs.stat().st_size / MIB:.1f} MiB); "
            "what the cluster has already is not sent again"
        )
        server.submit(
            make_entrypoint(command),
            job_id=job_id,
            runtime_env={
                "working_dir": str(inputs),
                "py_modules": [str(part) for part in code],
                "env_vars": {
                    **ENVIRONMENT,
                    RESUME_WITH: make_resume_command(typed),
                    OWNER: job_id,
                    **environment,
                },
            },
            metadata=make_metadata(package, typed, what=command[0]),
        )
    return job_id


def send_entry(
    server: JobServer, entry: Entry, package: Path, code: Sequence[Path], *, recipe: Mapping[str, Any]
) -> None:
    """Start a run of a queue as a Ray job; ``recipe`` is the recipe in its package, as plain data."""
    variables = {**ENVIRONMENT, OWNER: entry.job, **dict(entry.variables)}
    server.submit(
        make_entrypoint(["train", "--continue", *entry.options]),
        job_id=entry.job,
        runtime_env={
            "working_dir": str(package),
            "py_modules": [str(part) for part in code],
            "env_vars": variables,
        },
        metadata={
            OURS: version("dreamfleet"),
            "command": entry.command,
            AGAIN: f"dreamfleet submit --many {entry.command.partition(' ')[2]}",
            "run": entry.id,
            "method": recipe["method"]["name"],
            "output_dir": entry.output_dir,
            "priority": str(entry.priority),
        },
    )


def send_queue(
    server: JobServer,
    packages: Mapping[Entry, Package],
    folder: str,
    *,
    report: Callable[[str], None],
) -> str:
    """Send runs to the queue in ``folder``, and hold it unless another job does; return the job's ID."""
    job_id = make_job_id("queue")
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as temporary:
        place = Path(temporary) / "package"
        (place / ADDED).mkdir(parents=True)
        for entry, package in packages.items():
            package.write(place / ADDED).rename(place / ADDED / f"{entry.id}.zip")
        rows = [dataclasses.asdict(entry) for entry in packages]
        (place / ADDED / "entries.json").write_text(json_text(rows))
        shutil.copyfile(start_script(), place / START_FILE)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        report(f"sending the code and {len(packages)} recipes with their files ({size / MIB:.1f} MiB)")
        _submit_queue(server, job_id, place, ["run", folder], Path(temporary), folder)
    return job_id


def send_cancel(server: JobServer, entry_id: str, folder: str) -> str:
    """Ask the queue in ``folder`` to stop a run, by a job of its own; return the job's ID."""
    job_id = make_job_id("queue-stop")
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as temporary:
        place = Path(temporary) / "package"
        place.mkdir()
        shutil.copyfile(start_script(), place / START_FILE)
        _submit_queue(server, job_id, place, ["cancel", folder, entry_id], Path(temporary), "")
    return job_id


def _submit_queue(
    server: JobServer, job_id: str, place: Path, words: Sequence[str], temporary: Path, folder: str
) -> None:
    held = {
        QUEUE_KEY: folder,
        OURS: version("dreamfleet"),
        "command": "queue",
        "output_dir": folder,
        AGAIN: f"dreamfleet submit --many --queue {shlex.quote(folder)}",
    }
    server.submit(
        shlex.join(["exec", "sh", START_FILE, "-m", "dreamfleet.cluster.jobs.keep", QUEUE, *words]),
        job_id=job_id,
        runtime_env={
            "working_dir": str(place),
            "py_modules": [str(part) for part in write_code(temporary / "code")],
            "env_vars": ENVIRONMENT,
        },
        metadata=held if folder else {},
    )


def make_job_id(run_name: str) -> str:
    """Return a job ID from the name of a run, unique for each submission."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run_name).strip('-') or 'run'}-{uuid.uuid4().hex[:6]}"


def make_entrypoint(command: Sequence[str]) -> str:
    """Return the job's shell command: ``["train", "--json"]`` -> ``exec sh start.sh -m ... train recipe.yaml --json``.

    start.sh runs Ray's own Python, and keep.py starts a driver that was killed again. With ``exec``, Ray's signal
    reaches Python, not a shell.
    """
    name, *options = command
    words = ["exec", "sh", START_FILE, "-m", "dreamfleet.cluster.jobs.keep"]
    return shlex.join([*words, *name.split(), RECIPE_FILE, *options])


def make_metadata(package: Package, typed: Sequence[str], *, what: str) -> dict[str, str]:
    """Return the metadata that Ray stores with the job and `dreamfleet jobs` shows; ``what``: the command."""
    recipe = package.recipe
    return {
        OURS: version("dreamfleet"),
        "command": shlex.join(typed),
        "run": recipe.run_name,
        "method": recipe.method.name,
        "output_dir": recipe.output_dir,
        SETTINGS: json_text(
            {"what": what, "digest": package.digest, "recipe": recipe.model_dump(mode="json")}
        ),
    }


def find_equal(jobs: Sequence[Job], package: Package, *, what: str) -> Job | None:
    """Return the job that does ``what`` (train, tune ...) with a package into its output_dir now; None without one.

    Raises RecipeError with the difference if the job there has other settings or files.
    """
    recipe = package.recipe
    for job in jobs:
        known = job.metadata.get(SETTINGS)
        if job.is_over or job.metadata.get("output_dir") != recipe.output_dir or known is None:
            continue
        there = json.loads(known)
        if there["what"] != what or what == "data cache":  # the owner of the folder decides
            continue
        if there["digest"] == package.digest:
            return job
        changed = describe_differences(there["recipe"], recipe.model_dump(mode="json"))
        lines = changed or ["the files that the recipe names have changed"]
        raise RecipeError(
            f"job {job.id} trains into {recipe.output_dir} with other settings; stop it first (dreamfleet stop "
            f"{job.id}), or use another output_dir:\n  " + "\n  ".join(lines[:20])
        )
    return None


def read_environment(given: Sequence[str], local: Mapping[str, str]) -> dict[str, str]:
    """Parse ``KEY=VALUE``, and take the value of a bare ``KEY`` from ``local``.

    Raises RecipeError, whose message holds no values, for anything else.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise RecipeError(
                "--env: write KEY=VALUE, or KEY to use its value on this machine; one --env has neither form"
            )
        if not equals and name not in local:
            raise RecipeError(
                f"--env {name}: {name} is not set on this machine; set it, or write {name}=VALUE"
            )
        found[name] = value if equals else local[name]
    return found
