"""One run from beginning to end, as each worker does it: no Ray in here."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.assemble import Parts, Place, assemble
from dreamfleet.trainers.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.loop import Hooks, train
from dreamfleet.trainers.metrics import Metrics
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.validation import HeldOutLoss, draw_previews

log = logging.getLogger(__name__)
PACKAGES = ("dreamfleet", "torch", "diffusers", "transformers", "ray", "deepspeed")


@dataclass
class Summary:
    """What a run came to; written as ``summary.json``."""

    run: str
    method: str
    exit_reason: str
    steps: int
    start_step: int
    images_seen: int
    workers: int
    global_batch: int
    device: str
    wall_seconds: float
    start_up_seconds: float
    train_seconds: float
    figures: dict[str, Any]
    best_checkpoint: str | None
    exports: list[str] = field(default_factory=list)
    bad_files: list[dict[str, str]] = field(default_factory=list)
    dataset_hash: str = ""
    base_model: str = ""
    base_model_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def open_run_folder(recipe: Recipe, *, resume: bool) -> Storage:
    """Return the run folder, refusing one in use unless ``resume``.

    Raises RecipeError for a folder that holds something else or another run, CheckpointError for a run of another method.
    """
    run = Storage(recipe.output_dir)
    used = run.list() or run.list_dirs()
    if not used:
        return run
    if not run.exists("recipe.yaml"):
        raise RecipeError(f"output_dir {recipe.output_dir} is not empty and holds no run; give another output_dir")
    if not resume:
        raise RecipeError(
            f"output_dir {recipe.output_dir} holds a run already; continue it with --resume, or give another output_dir"
        )
    import yaml

    before = yaml.safe_load(run.read_text("recipe.yaml"))["method"]["name"]
    if before != recipe.method.name:
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a run of {before}, and this recipe is for {recipe.method.name}; "
            f"give another output_dir"
        )
    return run


def run_worker(
    recipe: Recipe,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    started: float | None = None,
) -> Summary:
    """Do a whole run on this worker; every worker of the run calls it with the same recipe.

    ``started`` is the ``time.time()`` the command began at, for the start-up figure. Returns the same summary on every rank.
    """
    began = time.time()
    place = Place(rank, world, torch.device(device))
    parts = assemble(recipe, place)
    run = Storage(recipe.output_dir)
    checkpoints = Checkpoints(run, limit=recipe.train.checkpoints_total_limit)
    found = checkpoints.load_latest() if resume else None
    start_step = _restore(found, recipe, parts, place) if found else 0
    recorder = Recorder(recipe, parts, place, run, checkpoints, start_step, on_progress)
    recorder.open()
    ready = time.time()
    outcome = train(
        parts.method,
        parts.engine,
        parts.feed.stream(start_step),
        parts.prepare,
        rates=parts.rates,
        schedule=parts.schedule,
        seed=recipe.train.seed,
        start_step=start_step,
        hooks=Hooks(
            log=recorder.log,
            save=recorder.save,
            sample=recorder.sample,
            validate=recorder.validate,
            should_stop=should_stop,
        ),
    )
    trained = time.time()
    summary = Summary(
        run=recipe.run_name,
        method=recipe.method.name,
        exit_reason=outcome.exit_reason,
        steps=outcome.step,
        start_step=start_step,
        images_seen=outcome.step * parts.global_batch,
        workers=world,
        global_batch=parts.global_batch,
        device=torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else platform.processor() or "cpu",
        wall_seconds=0.0,
        start_up_seconds=ready - (started or began),
        train_seconds=trained - ready,
        figures=outcome.figures,
        best_checkpoint=recorder.best_checkpoint,
        bad_files=[bad._asdict() for bad in parts.sets.instances.bad],
        dataset_hash=parts.sets.instances.content_hash,
        base_model=recipe.model.pretrained_model_name_or_path,
        base_model_hash=parts.model.content_hash,
        versions=versions(),
    )
    recorder.close(summary, outcome.step, began=started or began)
    place.wait()
    return summary


def _restore(found: Checkpoint, recipe: Recipe, parts: Parts, place: Place) -> int:
    name = found.meta.get("method")
    if name != recipe.method.name:
        raise CheckpointError(f"the checkpoint of step {found.step} is of {name}, this recipe is for {recipe.method.name}")
    try:
        parts.method.load_state(found.learned)
        parts.engine.load_state(found.engine)
    except RecipeError as error:
        raise CheckpointError(f"the checkpoint of step {found.step} does not fit: {error}") from error
    now = run_identity(recipe, parts)
    changed = [key for key, value in now.items() if found.meta.get(key, value) != value]
    if changed and place.leads:
        log.warning(
            "continuing from step %d although %s changed: the run goes on, but not as if it had never stopped",
            found.step,
            ", ".join(changed),
        )
    if place.leads:
        log.info("continuing from step %d", found.step)
    return found.step


def run_identity(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """Return what must stay the same for a resumed run to equal one that never stopped."""
    return {
        "dataset_hash": parts.sets.instances.content_hash,
        "base_model_hash": parts.model.content_hash,
        "global_batch": parts.global_batch,
        "seed": recipe.train.seed,
    }


class Recorder:
    """Writes the run folder (rank 0) and keeps the other ranks waiting where they must."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        place: Place,
        run: Storage,
        checkpoints: Checkpoints,
        start_step: int,
        on_progress: Callable[[dict[str, Any]], None] | None,
    ):
        self.recipe, self.parts, self.place, self.run, self.checkpoints = recipe, parts, place, run, checkpoints
        self.start_step, self.on_progress = start_step, on_progress
        self.best: tuple[float, int] | None = None
        self.metrics: Metrics | None = None
        self.held_out: HeldOutLoss | None = None

    def open(self) -> None:
        """Write recipe and real pictures, measure and draw the untuned model."""
        validation = self.recipe.validation
        if validation.holdout:
            self.held_out = HeldOutLoss(
                validation.holdout,
                method=self.parts.method,
                data=self.recipe.data,
                count=validation.holdout_timesteps,
                rank=self.place.rank,
                world=self.place.world,
            )
        if self.place.leads:
            self.run.write_text("recipe.yaml", f"{provenance(self.recipe, self.parts)}{self.recipe.to_yaml()}")
            self.metrics = Metrics(self.run, start_step=self.start_step, report_to=self.recipe.report_to)
            if self.start_step == 0:
                self._write_real_pictures()
        if self.start_step == 0 and validation.sample_at_first:
            if figures := self.validate(0):
                self.log({"step": 0, **figures})
            self.sample(0)

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of figures."""
        if self.metrics is not None:
            self.metrics.log(line)
            if self.on_progress is not None:
                self.on_progress({**line, "total_steps": self.parts.schedule.total})

    def save(self, step: int) -> None:
        """Save a checkpoint; every rank calls, rank 0 writes, all wait until it is whole."""
        if step in self.checkpoints.steps():
            return
        if self.place.leads:
            self.checkpoints.save(
                step,
                learned=self.parts.method.state(),
                engine=self.parts.engine.state(),
                meta={
                    "method": self.recipe.method.name,
                    "workers": self.place.world,
                    **run_identity(self.recipe, self.parts),
                    "versions": versions(),
                },
            )
            if self.metrics is not None:
                self.metrics.flush()
        self.place.wait()

    def validate(self, step: int) -> dict[str, float]:
        """Measure the held-out loss; every rank gets rank 0's figure."""
        if self.held_out is None or not self.place.leads:
            return {}
        with self.parts.engine.averaged():
            loss = self.held_out.measure(self.parts.engine)
        if step and (self.best is None or loss < self.best[0]):
            self.best = (loss, step)
        return {"holdout_loss": loss}

    def sample(self, step: int) -> None:
        """Draw the preview grid of a step."""
        from dreamfleet.trainers.sd.sample import picture_grid

        validation = self.recipe.validation
        if not validation.prompts or not self.place.leads:
            return
        pictures, cells = draw_previews(self.parts.method, self.parts.engine, validation, self.recipe.data.resolution)
        grid = picture_grid(pictures, validation.num_images)
        self._write_picture(f"samples/step-{step:06d}.png", grid)
        size = {"width": pictures[0].width, "height": pictures[0].height}
        lines = [json.dumps({**cell, **size}, ensure_ascii=False) for cell in cells]
        self.run.write_text(f"samples/step-{step:06d}.jsonl", "\n".join(lines) + "\n")
        if self.metrics is not None:
            self.metrics.log_picture("samples", grid, step)

    @property
    def best_checkpoint(self) -> str | None:
        """The step with the lowest held-out loss, as a checkpoint's name where one was kept."""
        from dreamfleet.trainers.checkpoint import folder_name

        steps = self.checkpoints.steps()
        if not steps:
            return None
        best = self.best[1] if self.best else None
        return folder_name(best if best in steps else steps[-1])

    def close(self, summary: Summary, step: int, *, began: float) -> None:
        """Export, write the summary and the report."""
        if not self.place.leads:
            return
        if summary.exit_reason == "completed":
            summary.exports = self._export(step)
        summary.wall_seconds = time.time() - began
        self.run.write_text("summary.json", json.dumps(dataclasses.asdict(summary), indent=1))
        if self.metrics is not None:
            self.metrics.close()
        from dreamfleet.trainers.report import write_report

        write_report(self.run)

    def _export(self, step: int) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="dreamfleet-export-") as folder, self.parts.engine.averaged():
            paths = self.parts.method.export(
                Path(folder),
                self.recipe.run_name,
                formats=self.recipe.train.export_formats,
                step=step,
                metadata=artefact_metadata(self.recipe, self.parts, step),
                precision=self.recipe.train.save_precision,
            )
            for path in paths:
                self.run.upload(path, f"exports/{path.name}")
            return [path.name for path in paths]

    def _write_picture(self, rel: str, picture: Any) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        self.run.write_bytes(rel, buffer.getvalue())

    def _write_real_pictures(self) -> None:
        from PIL import Image

        from dreamfleet.trainers.pictures import read_pixels
        from dreamfleet.trainers.sd.sample import picture_grid

        uris = self.parts.sets.instances.column("uri")[:12]
        arrays = [(read_pixels(uri, self.recipe.data).transpose(1, 2, 0) + 1) * 127.5 for uri in uris]
        pictures = [Image.fromarray(array.round().clip(0, 255).astype("uint8")) for array in arrays]
        self._write_picture("samples/real.png", picture_grid(pictures, min(6, len(pictures))))


def versions() -> dict[str, str]:
    """Return the versions of what shapes a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(recipe: Recipe, parts: Parts) -> str:
    """Return the comment lines on top of a run's recipe.yaml: versions, dataset and base model."""
    lines = [f"{name} {number}" for name, number in versions().items()]
    return (
        f"# {', '.join(lines)}\n"
        f"# dataset {parts.sets.instances.content_hash} ({len(parts.sets.instances)} pictures)\n"
        f"# base model {recipe.model.pretrained_model_name_or_path} {parts.model.content_hash}\n"
    )


def artefact_metadata(recipe: Recipe, parts: Parts, step: int) -> dict[str, str]:
    """Return what is written into every artefact, as strings: recipe, steps, dataset and base model hashes."""
    told = recipe.model_dump(mode="json")
    for section, key in (("data", "instance_data_dir"), ("data", "class_data_dir"), ("data", "train_data_dir")):
        if told[section].get(key):  # artefacts are passed on; whose disk it was is nobody's business
            told[section][key] = told[section][key].rstrip("/").rpartition("/")[2]
    told["output_dir"] = recipe.run_name
    return {
        "dreamfleet_version": versions().get("dreamfleet", "unknown"),
        "dreamfleet_method": recipe.method.name,
        "dreamfleet_step": str(step),
        "dreamfleet_recipe": json.dumps(told, ensure_ascii=False),
        "dreamfleet_dataset_hash": parts.sets.instances.content_hash,
        "dreamfleet_base_model": Path(recipe.model.pretrained_model_name_or_path).name,
        "dreamfleet_base_model_hash": parts.model.content_hash,
    }
