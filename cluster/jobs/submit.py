"""Sends a run to a cluster as a Ray job: what it takes along, the command it starts, and what Ray is told of it."""

from __future__ import annotations

import re
import shlex
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from dreamfleet.cluster.jobs.client import OURS, RESUME_WITH, JobServer, make_resume_command
from dreamfleet.cluster.jobs.package import MIB, RECIPE_FILE, Parcel, write_wheel
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import Recipe

# Between Ray's SIGTERM, at which a run saves and ends, and its SIGKILL. Ray's own 3 seconds are too few for a step.
STOP_SECONDS = 900
ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),  # the job's supervisor reads it, in the job's environment
    "TQDM_DISABLE": "1",  # a log has no bars: Ray turns each redrawing into a line; our own lines stay
}


def send(
    server: JobServer,
    parcel: Parcel,
    command: Sequence[str],
    *,
    typed: Sequence[str],
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> str:
    """Upload code and parcel, start ``dreamfleet COMMAND`` on the cluster, and return the job's name.

    ``command`` is ``train``, ``tune`` or ``data cache`` with its options; ``typed`` what the person wrote, shown by
    `dreamfleet jobs`. ``environment`` is set for the job and its workers on top of :data:`ENVIRONMENT`; its values are
    never shown here.
    """
    job_id = make_job_id(parcel.recipe.run_name)
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
        wheel, inputs = write_wheel(Path(folder)), parcel.write(Path(folder))
        say(
            f"sending the code ({wheel.stat().st_size / MIB:.1f} MiB) and the recipe with {len(parcel.files)} files "
            f"({inputs.stat().st_size / MIB:.1f} MiB); what the cluster has already is not sent again"
        )
        server.submit(
            make_entrypoint(command),
            job_id=job_id,
            runtime_env={
                "working_dir": str(inputs),
                "py_modules": [str(wheel)],
                "env_vars": {**ENVIRONMENT, RESUME_WITH: make_resume_command(typed), **environment},
            },
            metadata=make_metadata(parcel.recipe, typed),
        )
    return job_id


def make_job_id(run_name: str) -> str:
    """Name a job after its run; each submission gets a name of its own."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run_name).strip('-') or 'run'}-{uuid.uuid4().hex[:6]}"


def make_entrypoint(command: Sequence[str]) -> str:
    """Write the job's shell command: ``["train", "--resume"]`` -> ``exec python -m ... train recipe.yaml --resume``.

    The wheel brings modules and no `dreamfleet` program. With ``exec`` no shell stands between Ray's signal and us.
    """
    name, *options = command
    return shlex.join(
        ["exec", "python", "-m", "dreamfleet.cluster.cli", *name.split(), RECIPE_FILE, *options]
    )


def make_metadata(recipe: Recipe, typed: Sequence[str]) -> dict[str, str]:
    """Return what Ray keeps with the job and `dreamfleet jobs` shows."""
    return {
        OURS: version("dreamfleet"),
        "command": shlex.join(typed),
        "run": recipe.run_name,
        "method": recipe.method.name,
        "output_dir": recipe.output_dir,
    }


def read_environment(given: Sequence[str], here: Mapping[str, str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` as it is, and take a bare ``KEY`` from ``here``; RecipeError (without values) for others."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise RecipeError("--env: write KEY=VALUE, or KEY to take its value from here; one is neither")
        if not equals and name not in here:
            raise RecipeError(f"--env {name}: {name} is not set here; set it, or write {name}=VALUE")
        found[name] = value if equals else here[name]
    return found
