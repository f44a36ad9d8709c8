"""Test submission to a real head node with token authentication: stop, resume, failures and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from planted import find_planted
from ray_head import SECRET, Head, dreamfleet, process_of
from typer.testing import Result

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("client"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("submit")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """Write a recipe for one Ray worker with more steps than any test waits for; return its path."""
    tree = tiny.make_recipe(
        folder,
        output_dir=str(folder / "runs" / "cat"),
        scaling__num_workers=1,
        train__max_train_steps=100_000,
        train__checkpointing_steps=100_000,
    )
    return tiny.write_recipe(folder / "r.yaml", tree)


def submit(recipe: Path, *overrides: str, options: tuple[str, ...] = ()) -> Result:
    shared = f"--shared={recipe.parent / 'runs'}"
    return dreamfleet(
        "submit", shared, "--env", f"PROBE={SECRET}", *options, "--", "train", recipe, *overrides
    )


def test_a_stopped_job_saves_and_is_resumed(recipe: Path, head: Head) -> None:
    run = recipe.parent / "runs" / "cat"
    sent = submit(recipe)
    assert sent.exit_code == 0, sent.output
    job_id = sent.stdout.strip()
    assert re.fullmatch(r"cat-[0-9a-f]{6}", job_id)

    follower = subprocess.Popen(
        [sys.executable, "-m", "dreamfleet.cluster.cli", "logs", job_id, "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    assert next(line for line in follower.stdout if line.startswith("step ")), "no progress was shown"
    follower.send_signal(signal.SIGINT)
    _, message = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert job_id in message

    same = submit(recipe)
    assert same.stdout.strip() == job_id, "the same run is not sent twice"
    other = submit(recipe, "train.seed=8")
    assert other.exit_code == 2 and "train.seed: there 7, here 8" in other.stderr
    rows = {row["id"]: row for row in json.loads(dreamfleet("jobs", "--json").stdout)}
    assert rows[job_id]["state"] == "RUNNING", "Ctrl-C while following must not stop the job"
    assert rows[job_id]["output_dir"] == str(run)
    stopped = dreamfleet("stop", job_id)
    assert stopped.exit_code == 0, stopped.output
    assert stopped.stdout == f"{job_id} STOPPED\n"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["exit_reason"] == "interrupted"
    assert (run / "checkpoints" / f"step-{summary['steps']:06d}" / "manifest.json").exists()
    assert f"dreamfleet submit ... -- train {recipe} --resume" in stopped.stderr

    end = summary["steps"] + 3
    again = submit(recipe, f"train.max_train_steps={end}", "--resume", options=("--follow",))
    assert again.exit_code == 0, again.output
    assert f"step {end}/{end}" in again.stderr
    resumed = json.loads((run / "summary.json").read_text())
    assert (resumed["start_step"], resumed["steps"], resumed["workers"]) == (summary["steps"], end, 1)
    assert resumed["exit_reason"] == "completed"
    assert (run / "exports" / "cat.safetensors").exists()
    written = [path.read_text(errors="ignore") for path in run.glob("*.*")]
    assert not [text for text in written if SECRET in text]


def test_an_error_on_the_cluster_ends_with_its_exit_code(recipe: Path) -> None:
    """Test the exit code of an error raised by the code in the wheel.

    Depends on the test above, whose run leaves an existing output_dir.
    """
    refused = submit(recipe, "train.seed=8", options=("--follow", "--env", "DREAMFLEET_VERBOSE=1"))
    assert refused.exit_code == 2
    assert "train.seed: there 7, here 8" in refused.stderr
    assert re.search(r"py_modules_files/_ray_pkg_[^/]+/dreamfleet/trainers/run/", refused.stderr)

    table = dreamfleet("jobs").stdout.splitlines()
    assert [line.split()[1] for line in table] == ["STATE", "STOPPED", "SUCCEEDED", "FAILED"]
    job_id = refused.stdout.strip()
    assert table[-1].startswith(job_id)
    assert "train.seed" in dreamfleet("logs", job_id).stdout
    assert dreamfleet("logs", job_id, "--follow").exit_code == 2
    assert dreamfleet("stop", job_id).stdout == f"{job_id} FAILED\n"


def test_a_killed_driver_is_started_again_and_a_killed_job_reports_it(recipe: Path, head: Head) -> None:
    run = recipe.parent / "runs" / "killed"
    options = (f"output_dir={run}", "train.checkpointing_steps=1", "train.checkpoints_total_limit=2")
    job_id = submit(recipe, *options).stdout.strip()
    deadline = time.monotonic() + 300
    while not list(run.glob("checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline, dreamfleet("logs", job_id).output
        time.sleep(0.5)
    os.kill(process_of(job_id, "dreamfleet.cluster.cli"), signal.SIGKILL)
    while "continuing from step" not in dreamfleet("logs", job_id).stdout:
        assert time.monotonic() < deadline, dreamfleet("logs", job_id).output
        time.sleep(0.5)
    os.kill(process_of(job_id, "dreamfleet.cluster.jobs.keep"), signal.SIGKILL)

    followed = dreamfleet("logs", job_id, "--follow")
    assert followed.exit_code == 1
    command = f"dreamfleet submit ... -- train {recipe} {' '.join(options)} --resume"
    for shown in (followed, dreamfleet("jobs"), dreamfleet("logs", job_id)):
        assert "SIGKILL" in shown.stderr and command in shown.stderr, shown.output
    row = json.loads(dreamfleet("jobs", "--json").stdout)[-1]
    assert (row["id"], row["exit_code"], row["resume"]) == (job_id, 1, command)

    last = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    end = submit(recipe, *options, f"train.max_train_steps={last + 2}", "--resume", options=("--follow",))
    assert end.exit_code == 0, end.output
    assert "SIGKILL" not in dreamfleet("jobs").stderr, "the run was resumed"
    assert not find_planted(head.folder, recipe.parent), "the client's secrets reached the cluster"


def test_a_fleet_is_sent_with_its_table_and_its_images(recipe: Path) -> None:
    folder, fleet = recipe.parent, recipe.parent / "runs" / "fleet"
    for number in range(2):
        tiny.make_images(folder / f"subject-{number}", 2, seed=number)
    table = folder / "subjects.csv"
    table.write_text("name,images,train.seed\nalpha,subject-0,1\nbeta,subject-1,2\n")
    changes = ("train.max_train_steps=2", "method.lora_rank=2", f"output_dir={fleet}")
    shared = f"--shared={folder / 'runs'}"
    sent = dreamfleet("submit", shared, "--follow", "--", "fleet", table, recipe, *changes)
    assert sent.exit_code == 0, sent.output
    for name in ("alpha", "beta"):
        summary = json.loads((fleet / "subjects" / name / "summary.json").read_text())
        assert summary["exit_reason"] == "completed" and summary["steps"] == 2
        assert (fleet / "subjects" / name / "exports" / f"{name}.safetensors").exists()
        # The job read the images that were sent, not those of this machine.
        assert (
            str(folder) not in (fleet / "subjects" / name / "recipe.yaml").read_text().split("output_dir")[0]
        )
    assert (fleet / "index.html").exists() and (fleet / "fleet.parquet").exists()


def test_unknown_jobs_and_tokens_are_refused(
    recipe: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = dreamfleet("logs", "cat-000000")
    assert unknown.exit_code == 2
    assert "cat-000000; `dreamfleet jobs`" in unknown.stderr
    for token in ("0" * 64, None):
        if token is None:
            monkeypatch.delenv("RAY_AUTH_TOKEN")
        else:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        refused = submit(recipe)
        assert refused.exit_code == 2
        assert "client" in refused.stderr
        assert "Set RAY_AUTH_TOKEN" in refused.stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(head.token)
    assert dreamfleet("jobs").exit_code == 0
