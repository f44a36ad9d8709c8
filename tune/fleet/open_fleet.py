"""Opens the folder of a fleet: a new one, or with ``--resume`` an existing one, and finds what is finished in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from dreamfleet.datasets.errors import CheckpointError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.differences import describe_differences, differences
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.run_folder import is_resumed
from dreamfleet.tune.fleet.class_images import share_class_images
from dreamfleet.tune.fleet.finisher import record_of_summary
from dreamfleet.tune.fleet.fleet_rows import FleetRows
from dreamfleet.tune.fleet.progress import COMPLETED, FAILED, INTERRUPTED, States
from dreamfleet.tune.fleet.records import Records
from dreamfleet.tune.fleet.subjects import PLACEHOLDER, SubjectRecipes, Subjects, refuse

RECIPE = "fleet.yaml"
# Sections that may change when a fleet is resumed: they determine how subjects are run, not what they train.
CHANGEABLE = ("fleet", "search", "scaling", "storage", "output_dir", "report_to", "tracking")
# Sections that determine what a subject trains.
TRAINED = ("method", "model", "data", "train", "optimizer")


def open_fleet(recipe: Recipe, *, resume: bool) -> Storage:
    """Return the folder of a fleet.

    Raises RecipeError if it is in use and not resumed, CheckpointError if it holds a fleet of another recipe.
    """
    folder = Storage(recipe.output_dir)
    if is_resumed(recipe, RECIPE, what="fleet", resume=resume):
        before = _without_images(yaml.safe_load(folder.read_text(RECIPE)))
        now = _without_images(recipe.model_dump(mode="json"))
        for tree in (before, now):
            for name in CHANGEABLE:
                tree.pop(name, None)
        if changed := describe_differences(before, now):
            raise CheckpointError(
                f"output_dir {recipe.output_dir} holds a fleet of another recipe ({', '.join(changed[:5])}). "
                "Only the sections fleet and scaling may change; give another output_dir, or set the key for new "
                "subjects in a column"
            )
    return folder


def find_finished(
    fleet: Storage,
    subjects: Subjects,
    recipes: SubjectRecipes,
    rows: FleetRows,
    states: States,
    *,
    source: str,
) -> Records:
    """Set the states of the subjects of a resumed fleet, and their rows; return its record.

    Reads the record, lists the run folders once, and opens only those that the record does not call completed.
    Completed subjects are not repeated; a subject whose row changed since is an error, unless its run folder was
    removed. Raises RecipeError that lists these.
    """
    records = Records(fleet)
    indices = {name: index for index, name in enumerate(subjects.names)}
    folders = set(fleet.list_dirs("subjects"))
    changed: dict[int, str] = {}
    for record in records:
        index = indices.get(record["name"])
        if index is None:
            continue
        rows.put(index, record)
        states[index] = COMPLETED if record["status"] == "completed" else FAILED
        changed.pop(index, None)
        if states[index] == COMPLETED and record["digest"] != subjects[index].digest:
            changed[index] = "completed with other values"
    for index in [index for index in changed if subjects.names[index] not in folders]:
        del changed[index]  # its run folder was removed, to train it again
        states[index] = INTERRUPTED
    new = []
    for name in folders & indices.keys():
        index = indices[name]
        if states[index] == COMPLETED:
            continue
        if keys := _changed_keys(fleet, name, recipes, subjects[index]):
            changed[index] = f"started with another {', '.join(keys[:3])}"
        elif summary := _completed_summary(fleet, name):
            new.append(record_of_summary(name, subjects.rows[index], subjects[index].digest, summary))
            rows.put(index, new[-1])
            states[index] = COMPLETED
        elif states[index] != FAILED:
            states[index] = INTERRUPTED
    refuse(source, [_changed_row(subjects, index, how) for index, how in sorted(changed.items())][:100])
    records.append(new)
    return records


def to_start(subjects: Subjects, states: States) -> Iterable[int]:
    """Return the indices of the subjects that are not completed, in the order in which they start."""
    return [index for index in subjects.order() if states[index] != COMPLETED]


def _changed_row(subjects: Subjects, index: int, how: str) -> str:
    name = subjects.names[index]
    return (
        f"row {subjects.rows[index]}: {name!r} was {how}. Restore the row, give it another name, or remove "
        f"subjects/{name} in output_dir to train it again"
    )


def _completed_summary(fleet: Storage, name: str) -> Mapping[str, Any] | None:
    path = f"subjects/{name}/summary.json"
    try:
        summary = json.loads(fleet.read_text(path)) if fleet.exists(path) else {}
    except (UserError, ValueError):
        return None  # written by a killed process; the subject continues from its checkpoint
    return summary if summary.get("exit_reason") == "completed" else None


def _changed_keys(fleet: Storage, name: str, recipes: SubjectRecipes, subject: Any) -> list[str]:
    """Return the keys in which the recipe of a subject differs from that with which it was started."""
    path = f"subjects/{name}/recipe.yaml"
    if not fleet.exists(path):
        return []
    before = yaml.load(fleet.read_text(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    now = recipes.task_tree(subject)
    share_class_images(now, fleet.url)
    before, now = ({name: tree.get(name) for name in TRAINED} for tree in (before, now))
    return differences(before, now)


def _without_images(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a plain recipe without the placeholder of images, whose path starts at the recipe's folder."""
    data = tree["data"]
    if str(data.get("instance_data_dir")).endswith(PLACEHOLDER):
        return {**tree, "data": {**data, "instance_data_dir": None}}
    return tree
