"""Tests of run folders: which are accepted, how they are locked, and how signals stop a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import recipe_tree

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.run_folder import locked, open_run_folder
from dreamfleet.trainers.run.signals import stop_on_signal

TEXTUAL_INVERSION = {"name": "textual_inversion", "placeholder_token": "<x>"}


def test_a_used_output_dir_and_a_run_of_another_method_are_refused(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, "run", train__max_train_steps=1)
    recipe = build_recipe(tree)
    run_worker(recipe)
    with pytest.raises(RecipeError, match="--resume"):
        open_run_folder(recipe, resume=False)
    open_run_folder(recipe, resume=True)
    other = build_recipe(recipe_tree(tmp_path, "run", method=TEXTUAL_INVERSION))
    with pytest.raises(CheckpointError, match=r"dreambooth.*textual_inversion"):
        open_run_folder(other, resume=True)
    with pytest.raises(CheckpointError, match="dreambooth"):
        run_worker(other, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("hello")
    with pytest.raises(RecipeError, match="no run"):
        open_run_folder(build_recipe({**tree, "output_dir": str(tmp_path / "mine")}), resume=False)


def test_files_of_a_failed_start_do_not_prevent_a_run(tmp_path: Path) -> None:
    recipe = build_recipe(recipe_tree(tmp_path, "run"))
    left = tmp_path / "run"
    for folder in ("samples/empty", "checkpoints"):
        (left / folder).mkdir(parents=True)
    for name in ("run.log", "STOP", ".seen-0123"):
        (left / name).write_text("")
    open_run_folder(recipe, resume=False)
    (left / "samples/empty/diary.txt").write_text("hello")
    with pytest.raises(RecipeError, match="no run"):
        open_run_folder(recipe, resume=False)


def test_the_first_signal_requests_a_stop_and_the_second_interrupts(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    run.write_text("STOP", "left over")
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)

    def be_interrupted() -> None:
        with stop_on_signal(run, said.append) as stop:
            assert not run.exists("STOP")
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested.is_set()
            assert _eventually(lambda: run.exists("STOP"))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert signal.getsignal(signal.SIGINT) is before
    assert run.exists("STOP"), "workers that outlive the driver would go on"


def test_a_stop_mark_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    said: list[str] = []
    with stop_on_signal(Storage(tmp_path / "run"), said.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert _eventually(lambda: len(said) == 2)
        assert stop.requested.is_set() and "cannot write" in said[1]


def test_a_run_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    code = "import sys; from dreamfleet.trainers.run.run_folder import locked\n"
    code += "from dreamfleet.datasets.storage.storage import Storage\n"
    code += "with locked(Storage(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, run.path()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RecipeError, match="another process"), locked(run):
        pass
    other.kill()  # the lock ends with the process, also if it is killed
    other.communicate()
    with locked(run):
        pass
    with locked(Storage(tmp_path / "other")):
        pass
    assert not (tmp_path / "other").exists(), "a folder that never became a run is not left behind"


def _eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
