"""Tests of the Ray driver: progress display, stop file, checks before the start, and joining a cluster."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.datasets.environment import variables_to_send
from dreamfleet.datasets.errors import ResourceError, StorageError
from dreamfleet.datasets.storage.background import LINES
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver import progress
from dreamfleet.trainers.driver import session as ray_session
from dreamfleet.trainers.driver import shared_paths as machines
from dreamfleet.trainers.driver.preflight import check_inputs, preflight
from dreamfleet.trainers.driver.progress import Display, RunTail, log_to_run, watch_for_stop
from dreamfleet.trainers.driver.session import Node, RaySession
from dreamfleet.trainers.driver.shared_paths import shared_paths, written_paths
from dreamfleet.trainers.driver.throughput import Pace
from dreamfleet.trainers.driver.worker import worker_environment
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "images_per_second": 4.0, "step_seconds": 0.5, **more}


def test_plain_progress_lines_are_few_and_include_the_last_step() -> None:
    stream = io.StringIO()
    display = Display(total=100, stream=stream)
    for step in range(1, 101):
        display.show(line(step))
    display.show({"step": 100, "holdout_loss": 0.5})
    display.close()
    shown = stream.getvalue().splitlines()
    assert len(shown) == 2
    assert shown[0].startswith("step 1/100  loss 1.0000  4 images/s")
    assert shown[1].startswith("step 100/100")


def test_rate_and_remaining_time_are_averages_of_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, seconds = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    display = Display(total=1000, stream=stream)
    display.show(line(1, step_seconds=30.0, images_per_second=0.1))  # warm-up: not in the mean speed
    for step in range(2, 20):
        seconds[0] += progress.SECONDS_BETWEEN_LINES
        display.show(line(step))
    seconds[0] += progress.SECONDS_BETWEEN_LINES
    display.show(line(20, step_seconds=5.0, images_per_second=0.4))
    shown = stream.getvalue().splitlines()
    assert "left" not in shown[0] and "4 images/s" in shown[1] and "8:19 left" in shown[1]
    assert "2.71 images/s" in shown[-1]


def test_saves_and_previews_count_after_the_first_minute() -> None:
    pace = Pace()
    for step in range(1, 61):
        pace.add(line(step), now=step * 0.5)
    assert pace.seconds_left(10, now=30.0) == pytest.approx(5.0)
    for step in range(61, 200):
        pace.add(line(step), now=step * 2.0)  # 2 s per step, of which training takes 0.5 s
    assert pace.seconds_left(10, now=398.0) == pytest.approx(20.0, rel=0.01)
    assert pace.images_per_second == pytest.approx(4.0)
    pace.add(line(5, images_per_second=8.0), now=500.0)  # restarted from a checkpoint, on another machine
    assert pace.images_per_second == 8.0 and pace.seconds_left(10, now=500.0) is None


def test_the_rate_follows_a_change_of_speed_within_its_window() -> None:
    pace = Pace()
    for step in range(1, 200):
        pace.add(line(step, images_per_second=4.0 if step < 100 else 1.0), now=0.0)
    assert pace.images_per_second == pytest.approx(1.0, rel=0.05)


def test_a_terminal_shows_one_progress_bar() -> None:
    stream = Terminal()
    display = Display(stream=stream)
    for step in (1, 2, 3):
        display.show(line(step, total_steps=3))
    display.say("a warning")
    display.close()
    assert "3/3" in stream.getvalue()
    assert "loss 0.3333" in stream.getvalue()
    assert "a warning" in stream.getvalue()


def test_the_tail_shows_new_lines_also_after_a_restart(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    run.append_text("metrics.jsonl", json.dumps(line(1)) + "\n")
    stream = io.StringIO()
    with RunTail(run, Display(stream=stream)):
        with log_to_run(run, verbose=True):
            import logging

            logging.getLogger("dreamfleet.trainers.run.run").warning("3 pictures were left out")
        run.append_text("metrics.jsonl", json.dumps(line(2)) + "\n")
        run.append_text("metrics.jsonl", '{"step": 3, "lo')  # still being written
    shown = stream.getvalue()
    assert "WARNING 3 pictures were left out" in shown
    assert "step 2  loss 0.5000" in shown
    assert "step 1 " not in shown
    tail = progress._NewLines(run, "metrics.jsonl")
    run.write_text("metrics.jsonl", json.dumps(line(1)) + "\n")  # a restarted run rewrites the file
    assert tail.new_lines() == []
    run.append_text("metrics.jsonl", "{}\n")
    assert tail.new_lines() == ["{}"]


def test_a_stop_mark_is_found_on_disk_and_in_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOCAL_POLL_SECONDS", 0.0)
    monkeypatch.setattr(progress, "BUCKET_POLL_SECONDS", 0.01)

    class Bucket:
        is_local = False
        marked = False
        looked = threading.Event()

        def exists(self, name: str) -> bool:
            self.looked.set()
            return self.marked

    run = Storage(tmp_path)
    with watch_for_stop(run) as asked:
        assert not asked()
        run.write_text("STOP", "")
        assert asked()
    bucket = Bucket()
    with watch_for_stop(bucket) as asked:  # type: ignore[arg-type]
        assert bucket.looked.wait(10)
        assert not asked()
        bucket.marked = True
        assert _eventually(asked)
    with watch_for_stop(run, watch=False) as asked:
        assert not asked()


class AwayStorage(Storage):
    """Storage that fails: logs a warning, as a bucket does, and raises StorageError."""

    tries = 0
    last_text = ""

    def append_text(self, rel: str, text: str) -> None:
        self.tries, self.last_text = self.tries + 1, text
        if self.tries < 20:
            logging.getLogger("dreamfleet.datasets").warning("cannot write %s yet: trying again", rel)
        raise StorageError("no answer")


class AwayBucket(AwayStorage):
    is_local = False  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [AwayStorage, AwayBucket])
def test_warnings_about_failing_storage_cause_no_more_writes_to_it(
    kind: type[AwayStorage], tmp_path: Path
) -> None:
    run = kind(tmp_path)
    with log_to_run(run, verbose=True):
        logging.getLogger("dreamfleet.trainers").info("step 1")
        logging.getLogger("dreamfleet.trainers").info("step 2")
        LINES.submit(lambda: None).result(timeout=60)  # after the writes that the messages caused
        assert 1 <= run.tries <= 2
    assert run.tries <= 3  # the messages that are left are written at the end
    for kept in ("step 1", "step 2", "cannot write run.log yet"):
        assert kept in run.last_text


def test_missing_inputs_are_reported_before_workers_start(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path)
    assert shared_paths(build_recipe(tree)) == {
        "model.pretrained_model_name_or_path": [str(tmp_path / "model")],
        "data.instance_data_dir": [str(tmp_path / "pictures")],
    }
    check_inputs(build_recipe(tree))
    tree["model"]["pretrained_model_name_or_path"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        check_inputs(build_recipe(tree))


def test_workers_get_threads_and_credentials_that_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SOMETHING_ELSE", "stays")
    passed = worker_environment(3)
    assert passed["OMP_NUM_THREADS"] == "3"
    assert not {"SOMETHING_ELSE", "AWS_ENDPOINT_URL"} & passed.keys()  # Ray logs these variables
    assert variables_to_send(buckets=True)["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"


def test_a_private_ray_cluster_gets_a_new_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        with ray_session.authentication(private=True):
            assert os.environ["RAY_AUTH_MODE"] == "token"
            assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert "RAY_AUTH_MODE" not in os.environ
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert not (tmp_path / ".ray").exists()
        with ray_session.authentication(private=False):
            assert os.environ["RAY_AUTH_MODE"] == "disabled"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
        with ray_session.authentication(private=False):
            assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("token", "mine")
    finally:
        monkeypatch.undo()
        ray_session._reread_authentication()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:10001", "http://127.0.0.1:8265", "nonsense"]
)
def test_an_address_without_a_cluster_is_reported_at_once(address: str) -> None:
    with pytest.raises(ResourceError, match=r"--address"), ray_session.ray_session(address):
        pass


def test_folders_that_machines_do_not_share_are_reported(tmp_path: Path) -> None:
    near, far = (ray_session.Node(name, name, {}) for name in ("10.0.0.1", "10.0.0.2"))
    assert machines.find_missing([str(tmp_path), str(tmp_path / "nowhere")]) == [str(tmp_path / "nowhere")]
    markers = {"/runs/cat/.seen-1": "output_dir"}
    with pytest.raises(StorageError, match=r"output_dir /runs/cat is not shared.*10\.0\.0\.2"):
        machines.refuse_unseen([(near, []), (far, ["/runs/cat/.seen-1", "/data"])], markers)
    with pytest.raises(StorageError, match=r"/data .*10\.0\.0\.2"):
        machines.refuse_unseen([(near, []), (far, ["/data"])], markers)


class GrowingCluster(ray_session.RaySession):
    """An autoscaling cluster of which only the head node is running."""

    def nodes(self) -> list[ray_session.Node]:
        return [ray_session.Node("head", "10.0.0.1", {"CPU": 2.0})]

    def growth_limit(self) -> dict[str, float] | None:
        return {"CPU": 8.0, "GPU": 4.0}

    def free(self) -> dict[str, float]:
        return {"CPU": 2.0}


def test_local_paths_on_an_autoscaling_cluster_require_shared(tmp_path: Path) -> None:
    """Test that paths are refused although the running machine sees them: later machines would not."""
    tree = tiny.make_recipe(tmp_path, scaling={"num_workers": 1, "use_gpu": False})
    recipe, session = build_recipe(tree), GrowingCluster(private=False, address="10.0.0.1:6379")
    with pytest.raises(StorageError, match=r"(?s)--shared") as error:
        preflight(recipe, session, print)
    for key in ("output_dir", "data.instance_data_dir", "model.pretrained_model_name_or_path"):
        assert f"{key} {tmp_path}" in str(error.value)
    with pytest.raises(StorageError, match="output_dir"):
        preflight(recipe, session, print, shared=[str(tmp_path / "pictures"), str(tmp_path / "model")])
    assert not (tmp_path / "run").exists(), "nothing was written"
    preflight(recipe, session, print, shared=[str(tmp_path)])
    preflight(recipe, session, print, shared=["/"])
    tree["data"]["instance_data_dir"] = (
        "/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_1/inputs"
    )
    tree["model"]["pretrained_model_name_or_path"] = "pocket"
    tree["output_dir"] = "s3://bucket/run"
    # Files of a job's package, models of the hub and buckets are available on every machine.
    preflight(build_recipe(tree), session, print)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data__class_data_dir": "class"}, "data.class_data_dir"),
        ({"data__mask_dir": "masks", "data__alpha_mask": True}, "data.mask_dir"),
        ({"data__cache_dir": "cache"}, "data.cache_dir"),
        ({"validation": {"holdout": "held"}}, "validation.holdout"),
        ({"validation": {"clip": "clip"}}, "validation.clip"),
        ({"engine__deepspeed_config": "ds.json"}, "engine.deepspeed_config"),
        ({"model__pretrained_vae_model_name_or_path": "vae"}, "model.pretrained_vae_model_name_or_path"),
        (
            {
                "method": {
                    "name": "textual_inversion",
                    "placeholder_token": "<x>",
                    "initial_embedding": "a.pt",
                }
            },
            "method.initial_embedding",
        ),
        (
            {"method": {"name": "dreambooth", "with_prior_preservation": True}},
            "class images beside output_dir",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_path_of_a_run_is_checked(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    """Test that each path outside the shared folders is an error that names its recipe key."""

    def outside(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: outside(inner) for name, inner in value.items()}
        words = ("textual_inversion", "dreambooth", "<x>")
        return f"/elsewhere/{value}" if isinstance(value, str) and value not in words else value

    shared = [str(tmp_path)]
    if "beside" in key:
        shared = [str(tmp_path / name) for name in ("run", "model", "pictures")]
    recipe = build_recipe(tiny.make_recipe(tmp_path, **{name: outside(v) for name, v in changes.items()}))
    session = GrowingCluster(private=False, address="10.0.0.1:6379")
    with pytest.raises(StorageError) as error:
        machines.check_machines(
            session, reads=shared_paths(recipe), writes=written_paths(recipe), shared=shared
        )
    assert f": {key} /" in str(error.value)


def test_a_local_disk_of_each_machine_is_not_a_shared_path(tmp_path: Path) -> None:
    recipe = build_recipe(tiny.make_recipe(tmp_path, engine={"nvme_path": "/nvme"}))
    assert "/nvme" not in str(shared_paths(recipe)) and "/nvme" in str(recipe.paths)


@pytest.fixture(scope="module")
def two_machines() -> Iterator[str]:
    """Start a cluster of two Ray nodes with one CPU each; return its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.cluster
def test_a_machine_that_is_lost_while_it_is_asked_is_left_out(tmp_path: Path, two_machines: str) -> None:
    """Test this with a node that Ray does not have; while it still counts as living it is an error."""
    lost = Node("ab" * 28, "10.0.0.9", {"CPU": 1.0})

    class Shrinking(RaySession):
        asked = 0

        def nodes(self) -> list[Node]:
            Shrinking.asked += 1
            return [*super().nodes(), *([lost] if Shrinking.asked <= Shrinking.seen_alive else [])]

        seen_alive = 1

    with ray_session.ray_session(two_machines):
        session = Shrinking(private=False, address=two_machines)
        folders = {"output_dir": [str(tmp_path)]}
        machines.check_machines(session, reads={}, writes=folders)
        assert Shrinking.asked == 2, "the machine was looked for a second time"
        Shrinking.asked, Shrinking.seen_alive = 0, 99
        with pytest.raises(ResourceError, match=r"10\.0\.0\.9 cannot run dreamfleet"):
            machines.check_machines(session, reads={}, writes=folders)


@pytest.mark.cluster
def test_a_run_joins_a_cluster_of_two_machines(tmp_path: Path, two_machines: str) -> None:
    tree = tiny.make_recipe(tmp_path, scaling__num_workers=2, scaling__placement_strategy="STRICT_SPREAD")
    result = fit(build_recipe(tree), address=two_machines)
    assert result.summary.workers == 2
    assert result.summary.exit_reason == "completed"
    assert not [name for name in os.listdir(result.run_folder) if name.startswith(".")]
    tree = tiny.make_recipe(
        tmp_path, scaling__num_workers=3, scaling__cpus_per_worker=1, output_dir=str(tmp_path / "b")
    )
    with pytest.raises(ResourceError, match="room for 2"):
        fit(build_recipe(tree), address=two_machines)
    assert not (tmp_path / "b").exists()


def _eventually(condition: Any) -> bool:
    for _ in range(500):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False
