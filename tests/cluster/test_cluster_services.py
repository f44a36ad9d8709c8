"""Tests on a real cluster of two nodes with a token: metrics in Prometheus, `doctor --address`, and planted secrets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from planted import PLANTED, SECRETS, find_planted
from ray_heads import RayHead, free_ports, ray_head
from typer.testing import CliRunner

from dreamfleet.cluster.cli.program import app
from dreamfleet.cluster.monitoring import dashboard
from dreamfleet.trainers.driver import session

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),  # of MLflow's libraries
]
MONITORING = Path(dashboard.__file__).parent
SEARCH = {
    "metric": "holdout_loss",
    "num_trials": 2,
    "space": {"optimizer.learning_rate": {"distribution": "choice", "values": [1e-4, 1e-3]}},
}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """Start two nodes that report metrics often."""
    often = {"RAY_metrics_report_interval_ms": "500"}
    with ray_head(tmp_path_factory.mktemp("home"), environment=often) as head:
        yield head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("services")
    tiny.make_images(folder / "holdout", 2, seed=5)
    return folder


@pytest.fixture(autouse=True)
def client(head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the cluster's addresses, its token and secrets in this process, and an empty home folder."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.jobs)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    monkeypatch.undo()
    session._reread_authentication()


def write_recipe(folder: Path, run: str, **changes: Any) -> Path:
    options = {
        "output_dir": str(folder / "runs" / run),
        "scaling__num_workers": 2,
        "train__max_train_steps": 8,
        "train__checkpointing_steps": 2,
        "validation": {"holdout": str(folder / "holdout"), "steps": 4},
        "report_to": ["tensorboard", "mlflow", "wandb"],
        "tracking__folder": str(folder / "trackers"),
        **changes,
    }
    return tiny.write_recipe(folder / f"{run}.yaml", tiny.make_recipe(folder, **options))


def dreamfleet(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert PLANTED not in result.output
    return result


@pytest.fixture
def prometheus(head: RayHead, tmp_path: Path) -> Iterator[str]:
    """Start Prometheus with the configuration of cluster/monitoring; return its address."""
    if (program := shutil.which("prometheus")) is None:
        pytest.skip("no Prometheus on this machine: apt-get install prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    config["global"]["scrape_interval"] = "1s"
    discovery = config["scrape_configs"][0]["file_sd_configs"][0]
    discovery.update(files=[str(head.service_discovery)], refresh_interval="1s")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]["result"]


def test_every_panel_shows_a_run(prometheus: str, folder: Path) -> None:
    """Train with Prometheus running; each query of the dashboard must return data while the run is shown."""
    recipe = write_recipe(folder, "watched", train__max_train_steps=4000, train__checkpointing_steps=5)
    words = ["train", str(recipe), f"output_dir={folder}/runs/watched"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    program = [sys.executable, "-m", "dreamfleet.cluster.cli"]
    with (folder / "watched.log").open("wb") as log:
        driver = subprocess.Popen([*program, *words], env=environment, stdout=log, stderr=log)
    try:
        missing = {
            f"{panel.title}: {expression}": expression.replace("$run", ".*")
            for panel in dashboard.PANELS
            if not panel.empty or panel.title == "Validation"
            for expression in panel.queries.values()
        }
        deadline = time.monotonic() + 300
        while missing and time.monotonic() < deadline:
            assert driver.poll() is None, (folder / "watched.log").read_text()[-3000:]
            time.sleep(1)
            missing = {title: text for title, text in missing.items() if not query_or_none(prometheus, text)}
        assert not missing, list(missing)
        ranks = set[str]()  # a scrape that took too long hides a series for a moment
        while ranks != {"0", "1"} and time.monotonic() < deadline:
            time.sleep(1)
            found = query_or_none(prometheus, "ray_dreamfleet_step_seconds")
            ranks = {series["metric"]["rank"] for series in found}
        assert ranks == {"0", "1"}
    finally:
        driver.send_signal(signal.SIGINT)
        driver.wait(timeout=120)


def query_or_none(prometheus: str, expression: str) -> list[dict[str, Any]]:
    try:
        return query(prometheus, expression)
    except OSError:
        return []


def test_the_dashboard_is_that_of_the_table() -> None:
    written = json.loads(dashboard.FILE.read_text())
    assert written == dashboard.dashboard(), "run `python -m dreamfleet.cluster.monitoring.dashboard`"
    names = {panel["title"] for panel in written["panels"]}
    assert len(names) == len(dashboard.PANELS)


def test_doctor_compares_the_nodes(head: RayHead, folder: Path) -> None:
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump({"provider": {"type": "local", "worker_ips": ["10.0.0.1", "10.0.0.2"]}}))
    result = dreamfleet("doctor", "--json", "--storage", folder / "store", "--config", config)
    assert result.exit_code == 2, "a machine is missing"
    lines = json.loads(result.stdout)
    by_name: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        by_name.setdefault(line["name"], []).append(line)
    assert by_name["cluster"][0]["detail"] == "2 machines"
    assert by_name["versions"][0]["state"] == "ok" and "ray 2." in by_name["versions"][0]["detail"]
    assert by_name["clocks"][0]["state"] == "ok"
    assert [line["state"] for line in by_name["storage"]] == ["ok", "ok"]
    assert len(by_name["link"]) == 2 and all("Gbit/s" in line["detail"] for line in by_name["link"])
    assert by_name["machines"][0]["state"] == "MISSING" and "1 of 2" in by_name["machines"][0]["detail"]
    assert all(line["remedy"] for line in lines if line["state"] == "MISSING")
    assert not list((folder / "store").iterdir()), "the probes are removed"
    bad = dreamfleet("doctor", "--storage", "s3://no-such-bucket/x", "--json")
    found = [line for line in json.loads(bad.stdout) if line["name"] == "storage"]
    assert len(found) == 2 and {line["state"] for line in found} == {"MISSING"}
    assert not find_planted(head.folder, folder), "a secret is in a node's log of the failed requests"


def test_no_secret_leaves_the_client(head: RayHead, folder: Path) -> None:
    """Run a training, a search, a fleet and a job; look for planted secrets in files, processes and Ray's state."""
    train = dreamfleet("train", write_recipe(folder, "trained"))
    assert train.exit_code == 0, train.output
    search = dreamfleet("tune", write_recipe(folder, "searched", search=SEARCH, scaling__num_workers=1))
    assert search.exit_code == 0, search.output
    (folder / "subjects.csv").write_text(f"name,images\nalpha,{folder / 'pictures'}\n")
    recipe = write_recipe(folder, "fleet", scaling__num_workers=1)
    fleet = dreamfleet("fleet", folder / "subjects.csv", recipe)
    assert fleet.exit_code == 0, fleet.output
    recipe = write_recipe(folder, "job", report_to=["tensorboard"])
    job = dreamfleet("submit", f"--shared={folder}", "--follow", "--", "train", recipe)
    assert job.exit_code == 0, job.output
    for name in ("trained", "searched", "fleet", "job"):
        assert (folder / "runs" / name).is_dir()
    assert (folder / "trackers" / "mlflow.db").exists() and list((folder / "trackers" / "wandb").iterdir())
    assert not find_planted(head.folder, folder), "a secret is in a file, a command line or an environment"
    state = ray_state(head)
    assert "RUNNING" in state and "dreamfleet" in state, "the state API answered"
    assert PLANTED not in state
    assert head.token not in state, "the token is in Ray's state"


def ray_state(head: RayHead) -> str:
    """Return what Ray's state and job APIs tell about everything on the cluster."""
    paths = [
        f"api/v0/{kind}?detail=1&limit=1000"
        for kind in ("actors", "tasks", "workers", "nodes", "runtime_envs")
    ]
    found = [
        ask(head, path) for path in (*paths, "api/jobs/", "api/v0/placement_groups", "nodes?view=summary")
    ]
    return "\n".join(found)


def ask(head: RayHead, path: str) -> str:
    """Return the dashboard's answer; asked again for a minute, since a busy one answers 500 or too late."""
    request = urllib.request.Request(f"{head.jobs}/{path}", headers={"Authorization": f"Bearer {head.token}"})
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)
