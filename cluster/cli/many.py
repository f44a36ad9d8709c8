"""`dreamfleet submit --many`: sends runs to the queue on a cluster."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dreamfleet.datasets.errors import RecipeError, UserError

QUEUE_ENDED = "its queue has ended: submit it again"


@dataclass(frozen=True)
class Many:
    """What follows `submit --many`: recipes, overrides for all of them, and the options of the queue."""

    recipes: list[str]
    overrides: list[str]
    priority: int
    max_running: int | None
    queue: str | None


def submit_many(
    words: Sequence[str], address: str | None, *, shared: Sequence[str], env: Sequence[str], as_json: bool
) -> str:
    """Send runs to the queue of a cluster, print their IDs, and return the ID of the job that holds the queue."""
    from dreamfleet.cluster.cli.base import print_json, work

    with work():
        from dreamfleet.cluster.jobs.check_versions import check_cluster
        from dreamfleet.cluster.jobs.client import job_server
        from dreamfleet.cluster.jobs.package import check_here
        from dreamfleet.cluster.jobs.submit import read_environment, send_queue

        variables = read_environment(env, os.environ)
        packages, folder = pack_many(parse_many(words), shared=shared, variables=variables, check=check_here)
        with job_server(address) as server:
            check_cluster(server, print_note)
            job_id = send_queue(server, packages, folder, report=print_note)
    ids = [entry.id for entry in packages]
    if as_json:
        print_json({"id": job_id, "runs": ids, "queue": folder, "address": server.address})
    else:
        print("\n".join(ids), flush=True)
    print_note(
        f"queued in {folder}, held by job {job_id}. `dreamfleet jobs` lists the runs; stop one with: dreamfleet stop ID"
    )
    return job_id


def parse_many(words: Sequence[str]) -> Many:
    """Parse recipes, ``KEY.PATH=VALUE`` and options in any order. Raises RecipeError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise RecipeError(f"submit --many: {message}")

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--priority", type=int, default=0)
    parser.add_argument("--max-running", type=int)
    parser.add_argument("--queue")
    parser.add_argument("words", nargs="*")
    found = parser.parse_intermixed_args(list(words))
    overrides = [word for word in found.words if re.match(r"[A-Za-z_][\w.]*=", word)]
    recipes = [word for word in found.words if word not in overrides]
    if not recipes:
        raise RecipeError("submit --many: name at least one recipe: dreamfleet submit --many recipes/*.yaml")
    if found.max_running is not None and found.max_running < 1:
        raise RecipeError("submit --many: --max-running must be 1 or more")
    return Many(recipes, overrides, found.priority, found.max_running, found.queue)


def pack_many(
    many: Many,
    *,
    shared: Sequence[str],
    variables: Mapping[str, str],
    check: Callable[[Any], None],
) -> tuple[dict[Any, Any], str]:
    """Return the entries of the queue with their packages, and the queue's folder; ``check`` checks each recipe.

    Raises RecipeError for recipes that write to one output_dir, that use no workers, or that are too large together.
    """
    from dreamfleet.cluster.jobs.package import MAX_PACKAGE_BYTES, MIB, pack
    from dreamfleet.cluster.jobs.queue import Entry
    from dreamfleet.trainers.recipe import load_recipe

    packages: dict[Any, Any] = {}
    batch, now = uuid.uuid4().hex[:8], time.time()
    options = tuple(word for folder in shared for word in ("--shared", folder))
    places: dict[str, str] = {}
    for number, path in enumerate(many.recipes):
        recipe = load_recipe(path, many.overrides)
        if recipe.output_dir in places:
            raise RecipeError(
                f"{path} and {places[recipe.output_dir]} write to one output_dir, {recipe.output_dir}"
            )
        places[recipe.output_dir] = path
        if recipe.scaling.is_local:
            raise RecipeError(
                f"{path}: scaling.num_workers is 0; the queue starts runs with workers, set 1 or more"
            )
        package = pack(recipe, shared=shared, resume=True)
        check(recipe)
        entry = Entry(
            id=entry_id(recipe.run_name, recipe.output_dir),
            output_dir=recipe.output_dir,
            package=package.digest,
            code="",
            order=now + number * 1e-3,
            priority=many.priority,
            batch=batch,
            max_running=many.max_running,
            options=options,
            variables=tuple(sorted(variables.items())),
            command=shlex.join(["train", path, *many.overrides]),
        )
        packages[entry] = package
    total = sum(package.size for package in packages.values())
    if total > MAX_PACKAGE_BYTES:
        raise RecipeError(
            f"the files of these recipes have {total / MIB:.0f} MiB, and one submission may have "
            f"{MAX_PACKAGE_BYTES / MIB:.0f} MiB: submit fewer at once, or put the images into a bucket"
        )
    return packages, many.queue or default_queue(next(iter(places)))


def entry_id(run_name: str, output_dir: str) -> str:
    """Return the ID of a run in a queue, the same for each submission of its output_dir."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", run_name).strip("-") or "run"
    return f"{name}-{hashlib.sha256(output_dir.encode()).hexdigest()[:6]}"


def default_queue(output_dir: str) -> str:
    """Return the folder of the queue beside an output_dir."""
    return f"{os.path.dirname(output_dir.rstrip('/'))}/queue"


def read_queues(server: Any, jobs: Sequence[Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of each queue of a cluster by its folder, as its newest job last reported them."""
    import json

    from dreamfleet.cluster.jobs.queue import STATUS
    from dreamfleet.cluster.jobs.submit import QUEUE_KEY

    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if folder := job.metadata.get(QUEUE_KEY):
            lines = [line for line in server.logs(job.id).splitlines() if line.startswith(STATUS)]
            if lines:
                entries = json.loads(lines[-1].removeprefix(STATUS))
                found[folder] = [mark_ended(entry) if job.is_over else entry for entry in entries]
    return found


def mark_ended(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an entry whose queue has ended: what waits there does not start."""
    return {**entry, "reason": QUEUE_ENDED} if entry["state"] == "WAITING" else entry


def stop_queued(server: Any, entry_id: str) -> str | None:
    """Stop a run by its ID in a queue, wait until that is done, and return its state; None if no queue has it."""
    from dreamfleet.cluster.jobs.client import POLL_SECONDS
    from dreamfleet.cluster.jobs.submit import QUEUE_KEY, send_cancel

    asked = False
    while True:
        jobs = server.jobs()
        queues = read_queues(server, jobs)
        states = {
            entry["id"]: (folder, entry["state"], entry["job"])
            for folder, entries in queues.items()
            for entry in entries
        }
        if entry_id not in states:
            return None
        folder, state, _ = states[entry_id]
        if state in ("STOPPED", "SUCCEEDED", "FAILED"):
            return str(state)
        if not any(job.metadata.get(QUEUE_KEY) == folder and not job.is_over for job in jobs):
            started = states[entry_id][2]
            remedy = f"stop its job: dreamfleet stop {started}" if started else "it does not start"
            raise UserError(f"the queue of {entry_id}, {folder}, does not run now; {remedy}")
        if not asked:
            send_cancel(server, entry_id, folder)
            asked = True
        time.sleep(POLL_SECONDS)


def print_note(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
