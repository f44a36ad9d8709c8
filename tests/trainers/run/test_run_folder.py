"""Tests of run folders: which are accepted and continued, and how signals stop a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import recipe_tree

from dreamfleet.datasets.errors import CheckpointError, RecipeError, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.fence import begin_attempt
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.trainers.run.run_folder import open_run_folder, own
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


def test_a_start_that_failed_leaves_no_folder(tmp_path: Path) -> None:
    def start() -> None:
        run = Storage(tmp_path / "run")
        with own(run) as lease:
            begin_attempt(run, lease.owner, step=0).guarded().write_text("run.log", "what went wrong")
            raise StorageError("a file is in the way")

    with pytest.raises(StorageError, match="in the way"):
        start()
    assert not (tmp_path / "run").exists()
    with own(Storage(tmp_path / "run")):
        Storage(tmp_path / "run").write_text("recipe.yaml", "")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "lease.json",
        "recipe.yaml",
    ]


def test_equal_settings_are_continued_and_others_refused_key_by_key(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, "run")
    recipe = build_recipe(tree)
    open_run_folder(recipe, resume=False, continues=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("# written by another machine\n" + recipe.to_yaml())
    elsewhere = {**tree, "scaling": {"num_workers": 2}}
    open_run_folder(build_recipe(elsewhere), resume=False, continues=True)
    other = build_recipe({**tree, "train": {**tree["train"], "seed": 8, "max_train_steps": 9}})
    with pytest.raises(
        RecipeError, match=r"other settings.*\n  train\.max_train_steps: there 6, here 9\n.*here 8"
    ):
        open_run_folder(other, resume=False, continues=True)
    open_run_folder(other, resume=True)


def test_a_refused_folder_that_is_in_use_names_its_owner(tmp_path: Path) -> None:
    recipe = build_recipe(recipe_tree(tmp_path, "run"))
    with own(Storage(tmp_path / "run")):
        (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
        with pytest.raises(RecipeError, match=rf"in use by .*pid {os.getpid()}.*--resume"):
            open_run_folder(recipe, resume=False)


def _eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
