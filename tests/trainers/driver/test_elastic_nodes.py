"""A run of one to two workers on a cluster that grows by a node and loses it for good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.launch import FitResult, fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run_folder import STOP_FILE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_run_grows_with_a_new_node_and_continues_when_it_is_lost(tmp_path: Path) -> None:
    """The weights are equal, in every bit, to those of a run in one process."""
    from ray.cluster_utils import Cluster

    def recipe(run: str, **changes: Any) -> Any:
        options = {
            "output_dir": str(tmp_path / run),
            "train__train_batch_size": 1,
            "train__checkpointing_steps": 100_000,
            "train__max_train_steps": 100_000,
            "scaling": {"num_workers": [1, 2], "use_gpu": False, "cpus_per_worker": 1},
            **changes,
        }
        return build_recipe(tiny.make_recipe(tmp_path, **options))

    run = Storage(str(tmp_path / "run"))
    results: list[FitResult] = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})

    def train() -> None:
        shared = [str(tmp_path)]
        results.append(
            fit(recipe("run"), address=cluster.address, shared=shared, on_progress=lambda line: None)
        )

    def worlds() -> list[int]:
        return [event["world"] for event in read_events(run) if event["kind"] == "regroup"]

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not condition():
            assert training.is_alive() and time.monotonic() < end, worlds()
            time.sleep(0.1)

    training = threading.Thread(target=train, daemon=True)
    training.start()
    try:
        wait_for(lambda: len(read_metrics(run)) >= 5)
        node = cluster.add_node(num_cpus=1)
        wait_for(lambda: worlds() == [2])
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: worlds() == [2, 1])
        time.sleep(0.5)  # some steps of the survivor
        run.write_text(STOP_FILE, "")
        training.join(60)
    finally:
        cluster.shutdown()
    (result,) = results
    steps = result.summary.steps
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == list(range(1, steps + 1))
    changes = {"train__gradient_accumulation_steps": 2, "train__max_train_steps": steps}
    alone = fit(recipe("alone", scaling={"num_workers": 0}, **changes))
    expected, found = (Checkpoints(Storage(one.run_folder)).load_latest() for one in (alone, result))
    assert expected is not None and found is not None and expected.step == found.step
    assert all(torch.equal(found.learned[name], expected.learned[name]) for name in expected.learned)
