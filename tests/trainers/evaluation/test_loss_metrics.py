"""Metrics of the model from its losses on the training images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.vae_encoding import read_cut
from dreamfleet.trainers.config.metrics import METRICS, Metric
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.passes import drive, finish, no_passes
from dreamfleet.trainers.evaluation.loss_metrics import (
    BINS,
    MOST_IMAGES,
    VIEWS,
    MeasuredRun,
    make_model_metrics,
    make_overfitting,
    make_view_loss,
)
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.run import run_worker


class Planted:
    """A run whose losses in each measurement are given, ``[images][bins]``."""

    def __init__(self, *rounds: list[list[float]]):
        self.rounds, self.engine = rounds, self

    def evaluate_passes(self, passes: Any) -> Any:
        return passes

    def losses(self, **view: Any) -> Any:
        remaining = iter(self.rounds)

        class Images:
            def passes(self, engine: Any) -> Any:
                return no_passes(torch.tensor(next(remaining)).double())

        return Images()


def test_overfitting_is_the_mean_share_of_the_base_loss_that_is_gone_in_each_bin() -> None:
    base, tuned = [[1.0, 0.1], [3.0, 0.3]], [[0.5, 0.1], [1.5, 0.1]]
    run: Any = Planted(base, base, tuned, [[0.0, 0.0]] * 2, [[9.0, 9.0]] * 2)
    metric = drive(make_overfitting(run))
    assert drive(metric.figures(run))["overfitting"] == 0
    assert drive(metric.figures(run))["overfitting"] == pytest.approx((0.5 + 0.5) / 2)
    assert drive(metric.figures(run))["overfitting"] == 1
    assert drive(metric.figures(run))["overfitting"] == 0  # worse than the base is not overfitted


def test_view_loss_is_relative_to_the_untuned_model_in_each_bin() -> None:
    base = [[1.0, 0.1]]
    run: Any = Planted(base, base, [[0.5, 0.2]])
    metric = drive(make_view_loss(run))
    assert drive(metric.figures(run))["view_loss"] == pytest.approx(1)
    assert drive(metric.figures(run))["view_loss"] == pytest.approx((0.5 + 2) / 2)


def test_metrics_of_a_real_run_start_at_the_untuned_model_and_do_not_change_the_method(
    tmp_path: Path,
) -> None:
    parts = assemble(build_recipe(tiny.make_recipe(tmp_path)), DistributedContext())
    run = MeasuredRun(
        parts.method, parts.engine, parts.recipe.data, parts.sets.instances, DistributedContext()
    )
    before = {name: value.clone() for name, value in parts.method.state().items()}
    metrics = drive(make_model_metrics(["overfitting", "view_loss"], run))
    figures = figures_of(metrics, parts.engine)
    assert figures == {"overfitting": 0, "view_loss": 1}
    assert all(torch.equal(value, before[name]) for name, value in parts.method.state().items())
    with torch.no_grad():
        for value in parts.method.state().values():
            value.mul_(1.1)
    changed = figures_of(metrics, parts.engine)
    assert changed["view_loss"] != 1


def figures_of(metrics: Any, engine: Any) -> dict[str, float]:
    return {name: value for each in metrics for name, value in drive(finish(each.figures(engine))).items()}


def test_at_most_some_training_images_are_measured_evenly_chosen(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "pictures", MOST_IMAGES + 4, size=32)
    parts = assemble(build_recipe(tiny.make_recipe(tmp_path)), DistributedContext())
    run = MeasuredRun(
        parts.method, parts.engine, parts.recipe.data, parts.sets.instances, DistributedContext()
    )
    losses = run.losses()
    rows, chosen = run.training.column("id"), losses.index.column("id")
    positions = [rows.index(name) for name in chosen]
    steps = {after - before for before, after in itertools.pairwise(positions)}
    assert len(positions) == MOST_IMAGES and positions[0] == 0 and steps == {1, 2}
    assert losses.losses(parts.engine).shape == (MOST_IMAGES, BINS)


def test_views_are_cut_from_the_middle_and_differ_from_the_trained_images(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "blue")
    image.paste((255, 0, 0), (16, 16, 48, 48))
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one/0.png")
    index, data = build_index(tmp_path / "one"), build_recipe(tiny.make_recipe(tmp_path)).data
    plain, twice = (read_cut(index, ImageView(0), data, enlarged=factor) for factor in (1.0, 2.0))
    assert plain.shape == twice.shape == (32, 32, 3)
    assert (twice[2:-2, 2:-2] == (255, 0, 0)).all() and (plain[0, 0] == (0, 0, 255)).all()
    assert all(enlarged > 1 for enlarged in VIEWS)
    assert np.array_equal(plain, read_cut(index, ImageView(0), data))


def test_a_method_without_a_denoiser_is_refused_with_the_key(tmp_path: Path) -> None:
    images = tiny.make_two_classes(tmp_path / "pictures", 8)
    tree = tiny.make_recipe(
        tmp_path, method=tiny.DISCRIMINATOR, data={"instance_data_dir": str(images), "resolution": 32}
    )
    parts = assemble(build_recipe(tree), DistributedContext())
    run = MeasuredRun(
        parts.method, parts.engine, parts.recipe.data, parts.sets.instances, DistributedContext()
    )
    with pytest.raises(RecipeError, match=r"validation\.metrics.*discriminator"):
        drive(make_model_metrics(["overfitting"], run))


class Plain:
    """A metric from outside the package that computes its figures at once."""

    def __init__(self, run: MeasuredRun):
        self.images = run.losses()
        self.base = float(self.images.losses(run.engine).mean())

    def figures(self, engine: Any) -> dict[str, float]:
        return {"plain": float(self.images.losses(engine).mean()) / self.base}


def test_a_metric_may_return_its_figures_without_passes(tmp_path: Path) -> None:
    METRICS.register("plain")(Metric(title="plain", note="Loss relative to the first.", measure=Plain))
    try:
        validation = {"steps": 2, "metrics": ["loss", "plain"]}
        run_worker(build_recipe(tiny.make_recipe(tmp_path, train__max_train_steps=2, validation=validation)))
    finally:
        METRICS.unregister("plain")
    lines = [line for line in read_metrics(Storage(str(tmp_path / "run"))) if "plain" in line]
    assert [line["step"] for line in lines] == [0, 2] and lines[0]["plain"] == 1 != lines[1]["plain"]
