"""Trains a fleet: one model, LoRA or embedding for each subject of a table, on this machine or a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from dreamfleet.datasets.errors import Errors, RecipeError
from dreamfleet.datasets.storage.retry import patience
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.fleet import FleetConfig
from dreamfleet.trainers.driver.preflight import check_exists
from dreamfleet.trainers.driver.progress import Display
from dreamfleet.trainers.models.vision.judge_files import check_judges
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe, read_tree
from dreamfleet.trainers.run.disk import require_fleet_disk
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.ownership import Ownership
from dreamfleet.trainers.run.run_folder import own
from dreamfleet.trainers.run.signals import Stop, stop_on_signal
from dreamfleet.trainers.tracking.tracker import check_trackers
from dreamfleet.tune.fleet.columns import IMAGES
from dreamfleet.tune.fleet.finisher import Finisher
from dreamfleet.tune.fleet.fleet_rows import FleetRows
from dreamfleet.tune.fleet.image_places import paths_in
from dreamfleet.tune.fleet.notebook import notebook_html
from dreamfleet.tune.fleet.open_fleet import RECIPE, find_finished, open_fleet, to_start
from dreamfleet.tune.fleet.page import FleetPage
from dreamfleet.tune.fleet.progress import COMPLETED, FAILED, Progress, States
from dreamfleet.tune.fleet.read_subjects import read_subjects
from dreamfleet.tune.fleet.records import Records
from dreamfleet.tune.fleet.rows import SubjectRow
from dreamfleet.tune.fleet.source import FleetSource
from dreamfleet.tune.fleet.subjects import PLACEHOLDER, SubjectRecipes, Subjects, put
from dreamfleet.tune.fleet.table import Table, read_rows, read_table
from dreamfleet.tune.pool.pool import run_pool

_SOURCES = ("instance_data_dir", "image_dir", "train_data_dir", "concepts_list", "sets")


@dataclass(frozen=True)
class FleetResult:
    """The result of a fleet: why it ended, numbers of subjects, files, and a row for each subject.

    ``exit_reason``: "completed" if no subject is left, "limit" if ``fleet.max_subjects`` or ``fleet.max_hours`` left
    some, "interrupted" after a signal. ``remaining``: subjects that ``resume`` would train, without the failed ones.
    ``rows``: in the order of the table, read from a file when they are used.
    """

    exit_reason: Literal["completed", "limit", "interrupted"]
    folder: str
    total: int
    completed: int
    failed: int
    seconds: float
    table: str
    page: str
    title: str
    rows: Sequence[SubjectRow] = field(repr=False)

    @property
    def remaining(self) -> int:
        """Subjects that are neither completed nor failed."""
        return self.total - self.completed - self.failed

    def _repr_html_(self) -> str:
        return notebook_html(self.rows, self.folder, title=self.title)


def fleet(
    subjects: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    address: str | None = None,
    shared: Sequence[str] = (),
    continues: bool = False,
    take_over: bool = False,
) -> FleetResult:
    """Train one run for each subject of a table, each in ``output_dir/subjects/NAME``.

    ``subjects``: a csv, tsv, jsonl, parquet or YAML file, or rows. Its columns are ``name``, ``images`` (a folder or a
    list of images), ``prompt``, ``class_prompt``, ``priority``, and any keys of the recipe; an empty cell means the
    recipe's value. Relative paths start at the table's folder. ``recipe``: a recipe, or a recipe file with
    ``overrides``, which need not name images.

    ``resume`` continues a fleet: completed subjects are kept, also those of rows that were removed, started ones
    continue from their checkpoints, failed ones are tried again, and new rows are added. Checkpoints of completed
    subjects are removed unless ``fleet.keep_checkpoints`` is set. A subject that fails, for example on bad images,
    fails alone. ``scaling.num_workers``: 0 trains in this process, 1 on as many processes as fit, more is the number of
    workers of each subject. ``address``: of a Ray cluster, by default RAY_ADDRESS, else a private Ray. ``shared``:
    folders that all machines of a cluster can access. ``continues``: continue the fleet in ``output_dir`` if there is
    one, and wait if another process trains it; ``take_over``: take it from that process, which ends at its next write.

    Raises UserError that lists all errors of the table before anything starts. In the main thread, SIGINT and SIGTERM
    make the running subjects save a checkpoint and end the fleet.
    """
    began = time.monotonic()
    base, has_images = load_base(recipe, overrides)
    table = (
        read_rows(subjects)
        if isinstance(subjects, Sequence) and not isinstance(subjects, str)
        else read_table(subjects)
    )
    errors = Errors()
    with errors.collect():
        rows, recipes = read_subjects(table, base, has_images=has_images)
    _check_inputs(base, errors)
    errors.refuse()
    run = _Fleet(base, table, rows, recipes)
    display = Display()
    display.say(run.require_disk())
    open_folder = partial(open_fleet, base, resume=resume or continues or take_over)
    open_folder()
    waiting = open_folder if continues else None
    with (
        patience(base.storage.patience_seconds),
        own(run.folder, take_over=take_over, wait=waiting, say=display.say) as lease,
    ):
        open_folder()  # again: another process may have trained in it until now
        run.open(lease)
        with stop_on_signal(run.folder, display.say) as stop:
            reason = run.train(stop, display, lease, address=address, shared=shared)
    return run.result(reason, seconds=time.monotonic() - began)


def load_base(recipe: Recipe | str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Recipe, bool]:
    """Return the recipe of a fleet, and whether it names images; a recipe file need not."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                "overrides apply to a recipe file, and this recipe is an object: change the object instead"
            )
        return recipe, not str(recipe.data.instance_data_dir).endswith(PLACEHOLDER)
    tree, folder = read_tree(recipe, overrides)
    data = tree.get("data") or {}
    named = [data.get(key) for key in _SOURCES] if isinstance(data, dict) else [data]
    if any(value and value != PLACEHOLDER for value in named):
        return load_recipe(recipe, overrides), True
    put(tree, "data", {**data, "instance_data_dir": PLACEHOLDER})
    return build_recipe(tree, source=os.fspath(recipe), folder=folder), False


def _check_inputs(recipe: Recipe, errors: Errors) -> None:
    """Check the files that all subjects need; their images are checked with the table."""
    with errors.collect():
        check_trackers(recipe)
    with errors.collect():
        recipe.with_deepspeed_file()
    with errors.collect():
        check_judges(recipe.validation)
    for named in recipe.paths:
        with errors.collect():
            if named.field.kind != "images" and not errors.has(named.key):
                check_exists(named)


class _Fleet:
    """One command that trains a fleet."""

    def __init__(self, recipe: Recipe, table: Table, subjects: Subjects, recipes: SubjectRecipes):
        self.recipe, self.table, self.subjects, self.recipes = recipe, table, subjects, recipes
        self.limits = recipe.fleet or FleetConfig()
        self.folder = Storage(recipe.output_dir)
        self.states = States(len(subjects))
        self.rows = FleetRows(subjects, self.states)

    def require_disk(self) -> str:
        """Return the statement of the disk that the fleet needs. Raises ResourceError if ``output_dir`` has less."""
        first = self._common_recipe(0).model_copy(update={"output_dir": self.recipe.output_dir})
        return require_fleet_disk(first, subjects=len(self.subjects))

    def open(self, lease: Fence | Ownership) -> None:
        """Open the folder, of which this process has the lease, and find what is finished in it."""
        self.folder = self.folder.guarded(lease.check)
        if self.folder.exists(RECIPE):
            self.records = find_finished(
                self.folder, self.subjects, self.recipes, self.rows, self.states, source=self.table.path
            )
        else:
            self.records = Records(self.folder)

    def train(
        self,
        stop: Stop,
        display: Display,
        lease: Fence | Ownership,
        *,
        address: str | None,
        shared: Sequence[str],
    ) -> str:
        """Train the subjects that are not completed; return why it ended."""
        if not self.folder.exists(RECIPE):
            self.folder.write_text(RECIPE, self.recipe.to_yaml())
        waiting = list(to_start(self.subjects, self.states))
        progress = Progress(self.states, display.say)
        page = FleetPage(
            self.folder,
            title=self.recipe.run_name,
            method=self.recipe.method.display_name or self.recipe.method.name,
        )
        finisher = Finisher(
            self.folder, self.records, self.rows, page, keep_checkpoints=self.limits.keep_checkpoints
        )
        source = FleetSource(
            self.subjects,
            self.recipes,
            waiting,
            states=self.states,
            finisher=finisher,
            progress=progress,
            limits=self.limits,
        )
        finisher.start()
        ended = "completed"
        try:
            if waiting:
                progress.show()
                ended = run_pool(
                    source,
                    self._common_recipe(waiting[0]),
                    stop=stop,
                    say=display.say,
                    tasks=min(len(waiting), self.limits.max_subjects or len(waiting)),
                    max_concurrent=self.limits.max_concurrent,
                    reads=self._reads(),
                    address=address,
                    shared=shared,
                    should_stop=lambda: source.is_out_of_time or lease.is_lost,
                    owner=lease.owner,
                )
        finally:
            finisher.close()
            progress.show()
        if source.is_at_limit and (source.is_out_of_time or ended == "completed"):
            left = any(self.states[index] not in (COMPLETED, FAILED) for index in waiting)
            return "limit" if left else "completed"
        return ended

    def result(self, reason: Any, *, seconds: float) -> FleetResult:
        """Return the result of the command."""
        return FleetResult(
            exit_reason=reason,
            folder=self.folder.path(),
            total=len(self.subjects),
            completed=self.states.count(COMPLETED),
            failed=self.states.count(FAILED),
            seconds=seconds,
            table=self.folder.path("fleet.parquet"),
            page=self.folder.path("index.html"),
            title=self.recipe.run_name,
            rows=self.rows,
        )

    def _common_recipe(self, index: int) -> Recipe:
        """Return what the subjects have in common, with the images of one of them."""
        return self.recipes.recipe(self.subjects[index].values)

    def _reads(self) -> dict[str, list[str]]:
        """Return the local paths of all subjects, which every machine must see, by key."""
        places = dict.fromkeys(
            path
            for subject in self.subjects
            if (place := subject.values.get(IMAGES))
            for path in paths_in(place)
        )
        return {"images": list(places)}
