"""A run of one to two workers on a cluster that grows by a node and loses it for good."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS = 2000


def test_a_run_grows_with_a_new_node_and_continues_when_it_is_lost(tmp_path: Path) -> None:
    """The weights are equal, in every bit, to those of a run in one process."""
    from ray.cluster_utils import Cluster

    def recipe(run: str, **changes: Any) -> Any:
        options = {
            "output_dir": str(tmp_path / run),
            "train__train_batch_size": 1,
            "train__checkpointing_steps": 1000,
            "train__max_train_steps": STEPS,
            "scaling": {"num_workers": [1, 2], "use_gpu": False, "cpus_per_worker": 1},
            **changes,
        }
        return build_recipe(tiny.make_recipe(tmp_path, **options))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes: list[Any] = []
    worlds: list[int] = []

    def regroups() -> list[dict[str, Any]]:
        return [event for event in read_events(Storage(str(tmp_path / "run"))) if event["kind"] == "regroup"]

    def change_nodes(line: dict[str, Any]) -> None:
        worlds[:] = [event["world"] for event in regroups()]
        if line["step"] >= 5 and not nodes:
            nodes.append(None)
            threading.Thread(target=lambda: nodes.append(cluster.add_node(num_cpus=1)), daemon=True).start()
        elif worlds == [2] and len(nodes) == 2:
            nodes.append(None)
            threading.Thread(
                target=lambda: cluster.remove_node(nodes[1], allow_graceful=False), daemon=True
            ).start()

    try:
        result = fit(recipe("run"), address=cluster.address, shared=[str(tmp_path)], on_progress=change_nodes)
    finally:
        cluster.shutdown()
    assert [event["world"] for event in regroups()] == [2, 1]
    assert [line["step"] for line in read_metrics(Storage(result.run_folder))] == list(range(1, STEPS + 1))
    alone = fit(recipe("alone", scaling={"num_workers": 0}, train__gradient_accumulation_steps=2))
    expected, found = (Checkpoints(Storage(one.run_folder)).load_latest() for one in (alone, result))
    assert expected is not None and found is not None
    assert all(torch.equal(found.learned[name], expected.learned[name]) for name in expected.learned)
