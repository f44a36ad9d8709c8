"""A dry run: executes each part of a run once, keeps no results, and reports errors before the run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.index.sets import load_held_out, load_sets
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import TRAINING, explain_out_of_memory, on_device
from dreamfleet.trainers.evaluation.judge import Judge, References
from dreamfleet.trainers.memory.engine_selection import settle_engine
from dreamfleet.trainers.models.vision.judge_files import check_judges
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.disk import require_run_disk
from dreamfleet.trainers.run.export import write_artifacts
from dreamfleet.trainers.run.run_folder import open_run_folder
from dreamfleet.trainers.step_metrics import peak_memory
from dreamfleet.trainers.tracking.tracker import check_trackers


class CheckLine(NamedTuple):
    """One check: its name, whether it passed, and a detail or the error."""

    name: str
    ok: bool
    detail: str


def check_run(recipe: Recipe, *, device: str = "cpu") -> list[CheckLine]:
    """Check a recipe's output folder, images, model, one step and one export; return one line per check.

    No files are kept. Class images are not generated, as that can take hours: the step runs without prior
    preservation. A check that needs the result of a failed one is skipped.
    """
    with on_device(device, remedies=TRAINING) as settled:
        return _check_on(recipe, DistributedContext(device=settled))


def _check_on(recipe: Recipe, distributed: DistributedContext) -> list[CheckLine]:
    lines: list[CheckLine] = []
    made: list[Parts] = []

    def attempt(name: str, action: Callable[[], str]) -> bool:
        try:
            with explain_out_of_memory():
                lines.append(CheckLine(name, True, action()))
        except (UserError, RunFailed) as error:
            lines.append(CheckLine(name, False, str(error)))
        return lines[-1].ok

    def build() -> str:
        settled, _ = settle_engine(_without_prior(recipe), distributed)
        made.append(assemble(settled, distributed, keeps_files=False))
        base = made[0].method.base
        return f"{base.name} ({base.words})"

    fine = attempt("output_dir", lambda: _check_output(recipe))
    fine = attempt("pictures", lambda: _check_images(recipe)) and fine
    if recipe.report_to:
        attempt("report_to", lambda: _check_trackers(recipe))
    if recipe.validation.holdout:
        attempt(
            "holdout", lambda: f"{len(load_held_out(recipe.validation.holdout or '', recipe.data))} images"
        )
    if recipe.validation.preview_metrics:
        attempt("metrics", lambda: _check_metrics(recipe))
    try:
        if attempt("model", build):
            attempt("disk", lambda: _check_disk(recipe, made[0]))
        if made and fine:
            attempt("step", lambda: _check_step(made[0])) and attempt(
                "export", lambda: _check_export(made[0])
            )
    finally:
        for parts in made:
            parts.engine.close()
    return lines


def _check_output(recipe: Recipe) -> str:
    run = open_run_folder(recipe, resume=False)
    run.write_text(".check", "")
    run.remove(".check")
    if run.is_local and not any(Path(run.path()).iterdir()):
        Path(run.path()).rmdir()
    return f"{recipe.output_dir} can be written"


def _check_images(recipe: Recipe) -> str:
    index = load_sets(recipe.data, excluded=recipe.excluded_folders).instances
    bad = "".join(f"\n  left out {file.uri}: {file.reason}" for file in index.bad)
    return f"{len(index)} images{bad}"


def _check_trackers(recipe: Recipe) -> str:
    check_trackers(recipe)
    return ", ".join(recipe.report_to)


def _check_metrics(recipe: Recipe) -> str:
    check_judges(recipe.validation)
    judge = Judge(recipe.validation, references=References(), strip={})
    models = [f"{key}: {model.name}" for key, model in (("clip", judge.clip), ("dino", judge.dino)) if model]
    return f"{', '.join(judge.metrics)} ({', '.join(models) or 'no judge model'})"


def _check_disk(recipe: Recipe, parts: Parts) -> str:
    return require_run_disk(recipe, parts.method, images=len(parts.sets.instances))


def _check_step(parts: Parts) -> str:
    engine = parts.engine
    rates = {name: rate(0) for name, rate in parts.rates.items()}
    engine.begin_step(rates, 1)
    loss = engine.backward(parts.prepare(engine.to_device(parts.feed.batch(0))))
    engine.step(rates, 1)
    if not torch.isfinite(loss.total):
        raise RunFailed("the first loss is not a number: the model's weights or the precision do not fit")
    return f"loss {float(loss.total):.4f}, peak memory {peak_memory(engine.device) / 2**30:.2f} GiB"


def _check_export(parts: Parts) -> str:
    dataset_hash = parts.sets.instances.content_hash
    with tempfile.TemporaryDirectory(prefix="dreamfleet-check-") as folder, parts.engine.full_weights():
        paths = write_artifacts(parts.recipe, parts.method, Path(folder), step=0, dataset_hash=dataset_hash)
        return ", ".join(path.name for path in paths)


def _without_prior(recipe: Recipe) -> Recipe:
    if not getattr(recipe.method, "with_prior_preservation", False):
        return recipe
    return recipe.model_copy(
        update={"method": recipe.method.model_copy(update={"with_prior_preservation": False})}
    )
