"""Estimates the disk that a run, a search or a fleet will need, and refuses to start without room for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dreamfleet.datasets.errors import ResourceError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.fleet import FleetConfig
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.config.train import USUAL_CHECKPOINTING_STEPS
from dreamfleet.trainers.config.units import format_size
from dreamfleet.trainers.evaluation.previews import preview_requests
from dreamfleet.trainers.memory.profile import count_instances, method_without_weights
from dreamfleet.trainers.memory.slots import MAX_SLOTS
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.comparison import LONGEST_SIDE
from dreamfleet.trainers.report.report import MOST_GRIDS
from dreamfleet.trainers.run.saved_sizes import WeightSizes, checkpoint_bytes, measure_weights, weight_bytes
from dreamfleet.trainers.run.spool import spool_root

# Measured on the run folders of the pocket model. Bytes per pixel: PNG; WebP in base64, without loss for small images.
PNG, SMALL_WEBP, WEBP, SMALL_SIDE = 1.65, 2.1, 0.5, 160
REAL_IMAGES = 12  # images in samples/real.png
# Bytes of the text files of a run and of its report, per logged line and per preview image.
RUN_TEXT, REPORT_TEXT, LINE, CELL = 12_000, 24_000, 160, 160
SPOOLED = 3  # checkpoints of a run on its worker's disk while its bucket is away
MANY_TRIALS = 100  # of a search that only limits its hours


@dataclass(frozen=True)
class DiskNeed:
    """Bytes on disk by kind of file when a command has ended, at most, and ``writing``: more while it runs.

    ``spool``: bytes on the disks of the workers for checkpoints that wait for a bucket: the one that is being copied,
    the best and the newest.
    """

    lines: Mapping[str, int]
    writing: int = 0
    spool: int = 0

    @property
    def total(self) -> int:
        """The bytes when the command has ended."""
        return sum(self.lines.values())

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return self.total + self.writing

    def to_json(self) -> dict[str, int]:
        """Return the lines, the total and the peak as plain values."""
        return {**self.lines, "total": self.total, "peak": self.peak}

    def describe(self) -> str:
        """Return the sizes as text, such as ``3.0 GiB (checkpoints 2.0 GiB, exports 1.0 GiB)``."""
        sizes = {**self.lines, "more while it runs": self.writing}
        parts = [f"{name} {format_size(size)}" for name, size in sizes.items() if size > self.peak / 100]
        return f"{format_size(self.peak)} ({', '.join(parts)})"


def estimate_run(recipe: Recipe, sizes: WeightSizes, *, images: int | None = None) -> DiskNeed:
    """Estimate a run that completes. ``images``: the number of training images, which epochs are counted by."""
    one = checkpoint_bytes(recipe, sizes)
    lines = {
        "checkpoints": _checkpoints(recipe, images) * one,
        "exports": recipe.train.export * sum(sizes.exports.values()),
        "previews and report": _page_bytes(recipe, images),
        "class images": _class_image_bytes(recipe),
    }
    # A new checkpoint is complete before the oldest is removed.
    return DiskNeed({name: size for name, size in lines.items() if size}, writing=one, spool=SPOOLED * one)


def estimate_many(
    recipe: Recipe,
    sizes: WeightSizes,
    *,
    runs: int,
    at_once: int,
    kept: int,
    exported: int,
    images: int | None = None,
) -> DiskNeed:
    """Estimate ``runs`` runs, ``at_once`` of them at a time, that drop what is not needed when they have ended.

    ``kept``: runs that keep the weights of their best checkpoint. ``exported``: runs that are exported.
    """
    alone = estimate_run(recipe, sizes, images=images)
    pages, classes = (alone.lines.get(name, 0) for name in ("previews and report", "class images"))
    at_once = min(at_once, runs)
    lines = {
        "checkpoints": min(kept, runs) * weight_bytes(sizes),
        "exports": min(exported, runs) * sum(sizes.exports.values()),
        "previews and reports": runs * pages,
        "class images": classes,
    }
    running = at_once * (alone.lines.get("checkpoints", 0) + alone.writing)
    needed = {name: size for name, size in lines.items() if size}
    return DiskNeed(needed, writing=running, spool=at_once * alone.spool)


def estimate_search(
    recipe: Recipe, sizes: WeightSizes, *, trials: int, at_once: int, images: int | None = None
) -> DiskNeed:
    """Estimate a search: previews and report of every trial, weights and exports of the best ones."""
    best = recipe.search.keep_best if recipe.search else 1
    return estimate_many(recipe, sizes, runs=trials, at_once=at_once, kept=best, exported=best, images=images)


def require_disk(need: DiskNeed, recipe: Recipe, *, what: str = "this run", on_worker: bool = False) -> str:
    """Return the sentence that states the disk that is needed in ``output_dir``.

    What the folder already holds counts as room. Raises ResourceError if the disk, or the quota on it, has less. The
    room in a bucket is not known, but checkpoints pass through the worker's disk. ``on_worker``: this is its machine.
    """
    folder = Storage(recipe.output_dir)
    text = f"{what} needs about {need.describe()} in {recipe.output_dir}"
    if not folder.is_local:
        return f"{text}, {_require_spool(need, on_worker=on_worker)}"
    free, held = free_bytes(Path(folder.path())), folder.size() if folder.exists() else 0
    if need.peak > free + held:
        raise ResourceError(
            f"output_dir: {text}, and its disk has {format_size(free)} free. Free some space, use an output_dir on "
            f"another disk, or lower what is kept: {', '.join(_remedies(need, recipe))}"
        )
    return f"{text}; {format_size(free)} free"


def _require_spool(need: DiskNeed, *, on_worker: bool) -> str:
    text = f"and up to {format_size(need.spool)} on the worker's disk while the bucket is away"
    if not on_worker:
        return text
    root = spool_root()
    free = free_bytes(root)
    if free < need.spool // SPOOLED:
        raise ResourceError(
            f"checkpoints of about {format_size(need.spool // SPOOLED)} pass through {root}, and its disk has "
            f"{format_size(free)} free. Free some space, or set TMPDIR to a folder on another disk"
        )
    return f"{text} ({root}; {format_size(free)} free)"


def disk_needs(recipe: Recipe) -> dict[str, DiskNeed]:
    """Return the needs of a recipe's ``run`` and, if it has a ``search:`` section, of its ``search``.

    A search that sets no number of trials is estimated for 100, and without max_concurrent_trials for one worker.
    """
    sizes, images = measure_weights(recipe, method_without_weights(recipe)), count_instances(recipe)
    needs = {"run": estimate_run(recipe, sizes, images=images)}
    if (search := recipe.search) is not None:
        trials = search.num_trials or search.size or MANY_TRIALS
        at_once = search.max_concurrent_trials or _slots(recipe)
        needs["search"] = estimate_search(recipe, sizes, trials=trials, at_once=at_once, images=images)
    return needs


def require_run_disk(recipe: Recipe, method: Method, *, images: int | None) -> str:
    """Return the statement of :func:`require_disk` for one run."""
    need = estimate_run(recipe, measure_weights(recipe, method), images=images)
    return require_disk(need, recipe, on_worker=True)


def require_search_disk(recipe: Recipe) -> str:
    """Return the statement of :func:`require_disk` for the search of a recipe."""
    return _state(recipe, "this search", lambda: disk_needs(recipe)["search"])


def require_fleet_disk(recipe: Recipe, *, subjects: int) -> str:
    """Return the statement of :func:`require_disk` for a fleet whose subjects have recipes like ``recipe``."""

    def need() -> DiskNeed:
        sizes, images = measure_weights(recipe, method_without_weights(recipe)), count_instances(recipe)
        limits = recipe.fleet or FleetConfig()
        made = estimate_many(
            recipe,
            sizes,
            runs=subjects,
            at_once=limits.max_concurrent or _slots(recipe),
            kept=0,
            exported=subjects,
            images=images,
        )
        if not limits.keep_checkpoints:
            return made
        checkpoints = subjects * estimate_run(recipe, sizes, images=images).lines["checkpoints"]
        return DiskNeed({**made.lines, "checkpoints": checkpoints}, made.writing, made.spool)

    return _state(recipe, f"this fleet of {subjects} subjects", need)


def _state(recipe: Recipe, what: str, make_need: Callable[[], DiskNeed]) -> str:
    # The driver may lack the model, which only the workers read.
    try:
        need = make_need()
    except UserError as error:
        return f"the disk that {what} needs is not known: {error}"
    return require_disk(need, recipe, what=what)


def _slots(recipe: Recipe) -> int:
    return 1 if find_unpackable(recipe) else MAX_SLOTS["cpu"]


def free_bytes(folder: Path) -> int:
    """Return the bytes that may be written below a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _steps(recipe: Recipe, images: int | None) -> int:
    """Return the number of optimizer steps; with epochs over an unknown number of images, those of 1,000 images."""
    train = recipe.train
    if train.max_train_steps:
        return train.max_train_steps
    batch = recipe.scaling.max_workers * train.train_batch_size * train.gradient_accumulation_steps
    return max(1, math.ceil((train.num_train_epochs or 1) * (images or 1000) / batch))


def _checkpoints(recipe: Recipe, images: int | None) -> int:
    """Return the most checkpoints that a completed run keeps."""
    train, steps = recipe.train, _steps(recipe, images)
    every = train.checkpointing_steps or USUAL_CHECKPOINTING_STEPS
    if train.save_every_n_epochs:
        epochs = train.num_train_epochs or steps * train.train_batch_size / (images or 1000)
        saves = math.ceil(epochs / train.save_every_n_epochs)
    else:
        saves = math.ceil(steps / every)
    has_best = bool(recipe.validation.holdout or recipe.method.figures)
    limit = train.checkpoints_total_limit
    return saves + has_best if limit is None else min(saves + has_best, limit + has_best)


def _page_bytes(recipe: Recipe, images: int | None) -> int:
    """Return the bytes of the previews, of the logs and of the report that shows them."""
    validation, steps = recipe.validation, _steps(recipe, images)
    rounds = math.ceil(steps / validation.steps) + validation.sample_at_first
    requests = preview_requests(validation, recipe.data.resolution)
    sizes = [(request.width or 0, request.height or 0) for request in requests] * validation.num_images
    pixels = sum(width * height for width, height in sizes)
    real = REAL_IMAGES if images is None else min(REAL_IMAGES, images)
    side = recipe.data.resolution
    shown = [_shown_bytes(*size) for size in sizes]
    lines = (steps // recipe.train.log_steps + 2 + rounds) * LINE
    written = rounds * (PNG * pixels + CELL * len(sizes))
    board = (rounds * PNG * pixels + lines) * ("tensorboard" in recipe.report_to)
    page = min(rounds, MOST_GRIDS) * sum(shown) + real * _shown_bytes(side, side) + REPORT_TEXT
    return round(written + board + page + lines + real * PNG * side * side + RUN_TEXT)


def _shown_bytes(width: int, height: int) -> float:
    """Return the bytes of an image in the report, which shows large ones smaller."""
    longest = max(width, height)
    if longest <= SMALL_SIDE:
        return SMALL_WEBP * width * height
    return WEBP * width * height * min(1.0, LONGEST_SIDE / longest) ** 2


def _class_image_bytes(recipe: Recipe) -> int:
    """Return the bytes of the class images, which lie beside the run unless the data names a folder for them."""
    if not getattr(recipe.method, "with_prior_preservation", False):
        return 0
    return round(PNG * recipe.data.resolution**2 * recipe.method.num_class_images)  # type: ignore[attr-defined]


def _remedies(need: DiskNeed, recipe: Recipe) -> list[str]:
    """Return the settings that lower a kind of file which takes at least a tenth of the disk."""
    train, lines = recipe.train, need.lines
    sizes = {
        "checkpoints": lines.get("checkpoints", 0) + need.writing,
        "exports": lines.get("exports", 0),
        "pages": sum(size for name, size in lines.items() if name.startswith("previews")),
        "class images": lines.get("class images", 0),
    }
    has = {name: size > need.peak / 10 for name, size in sizes.items()}
    remedies = {
        "train.checkpoints_total_limit=1": has["checkpoints"] and train.checkpoints_total_limit != 1,
        "a larger train.checkpointing_steps": has["checkpoints"] and train.checkpoints_total_limit is None,
        "train.save_precision=fp16": has["exports"] and train.save_precision == "fp32",
        "fewer train.export_formats": has["exports"],
        "optimizer.name=adafactor, which keeps almost no state": recipe.optimizer.name == "adamw"
        and sizes["checkpoints"] > need.peak / 2,
        "a larger validation.steps": has["pages"],
        "fewer validation.num_images": has["pages"] and recipe.validation.num_images > 1,
        "fewer method.num_class_images": has["class images"],
    }
    return [remedy for remedy, applies in remedies.items() if applies] or ["fewer runs"]
