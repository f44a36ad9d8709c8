"""Which weights of a search's trials are kept, and in which form; removals and exports that were interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from searches import make_trained_tree

from dreamfleet.datasets.errors import CheckpointError, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.engines.passes import Passes, no_passes
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.evaluation import Evaluation
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker
from dreamfleet.tune.retention import Retention, best_trials, describe_freed
from dreamfleet.tune.trial_store import Trial, TrialStore, read_store, trial_recipe

# The held-out losses of the trials at steps 1, 2, 3 and 4.
LOSSES = {
    "trial-000": [0.9, 0.5, 0.6, 0.7],
    "trial-001": [0.9, 0.8, 0.4, 0.6],
    "trial-002": [0.9, 0.8, 0.7, 0.6],
    "trial-003": [0.9, 0.3, 0.8, 0.9],
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialStore:
    """A search with one trial for each of the LOSSES, none of which has run."""
    tiny.make_images(tmp_path / "holdout", 1, seed=5)
    tree = make_trained_tree(tmp_path, str(tmp_path / "s"), [1e-3, 2e-3], grace_period=1)
    tree["train"] |= {"max_train_steps": 4, "checkpointing_steps": 3}
    tree["validation"] |= {"steps": 1, "sample_at_first": False, "prompts": []}
    recipe = build_recipe(tree)
    assert recipe.search is not None

    def measure(evaluation: Evaluation) -> Passes[dict[str, float]]:
        run = Storage(evaluation.parts.recipe.output_dir)
        return no_passes({"holdout_loss": LOSSES[run.url.rpartition("/")[2]][len(rounds_of(run))]})

    monkeypatch.setattr(Evaluation, "measure", measure)
    store = TrialStore(recipe)
    for rate in (1e-3, 2e-3):
        for vectors in (1, 2):
            store.add({"optimizer.learning_rate": rate, "method.num_vectors": vectors})
    return store


def rounds_of(run: Storage) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "holdout_loss" in line]


def train(store: TrialStore, name: str, *, status: str = "completed") -> Trial:
    """Train a trial, and record its rounds and end."""
    trial, run = store.trial(name), store.folder.child("trials", name)
    store.start(trial)
    run_worker(trial_recipe(store.recipe, trial.point, run.path()), resume=True)
    for line in rounds_of(run):
        store.record(trial, {"step": line["step"], "holdout_loss": line["holdout_loss"]})
    store.end(trial, status)
    return trial


def steps_of(store: TrialStore, name: str) -> list[int]:
    return Checkpoints(store.folder.child("trials", name)).steps()


def test_only_the_best_round_of_the_best_trial_is_kept_and_exported(store: TrialStore) -> None:
    retention = Retention(store)
    first = train(store, "trial-000")
    run = store.folder.child(first.folder)
    assert steps_of(store, "trial-000") == [2, 3, 4]
    before = run.size("checkpoints")
    retention.after_end(first)
    assert steps_of(store, "trial-000") == [2]  # its best round, of step 2
    assert not Checkpoints(run).load(2).resumable
    assert store.state.freed_bytes == before - run.size("checkpoints") > 0
    retention.after_end(train(store, "trial-001"))
    assert (steps_of(store, "trial-000"), steps_of(store, "trial-001")) == ([], [3])
    retention.after_end(train(store, "trial-002", status="stopped"))
    assert steps_of(store, "trial-002") == [] and steps_of(store, "trial-001") == [3]
    assert [trial.kept for trial in store.trials] == [False, True, False, True]  # the last one has not run
    assert not any(store.folder.exists(f"trials/{name}/exports") for name in LOSSES)
    retention = Retention(read_store(store.recipe))  # in another session
    store = retention.store

    assert [trial.name for trial in retention.finish()] == ["trial-001"]
    best = store.folder.child("trials/trial-001")
    exported = {name: best.read_bytes(f"exports/{name}") for name in best.list("exports")}
    again = export_run(best.path("checkpoints/step-000003"), [], out=store.folder.path("again"))
    assert sorted(exported) == sorted(path.rpartition("/")[2] for path in again)
    assert all(Path(path).read_bytes() == exported[path.rpartition("/")[2]] for path in again)
    summary = json.loads(best.read_text("summary.json"))
    assert sorted(summary["exports"]) == sorted(exported) and summary["best_checkpoint"] == "step-000003"
    dropped = store.folder.child("trials/trial-000")
    assert json.loads(dropped.read_text("summary.json"))["best_checkpoint"] is None
    assert dropped.exists("metrics.jsonl") and "step-000002" not in dropped.read_text("report.html")
    assert describe_freed(store).startswith("trial-001 exported; ")
    stored = read_store(store.recipe)
    assert stored.trials == store.trials and stored.state.stale_reports == []
    assert (stored.state.exported, stored.state.freed_bytes) == ({"trial-001": 3}, store.state.freed_bytes)


def test_an_optimizer_may_be_searched_under_the_name_of_another_program(store: TrialStore) -> None:
    store.trial("trial-000").point["optimizer.name"] = "torch.optim.AdamW"
    Retention(store).after_end(train(store, "trial-000"))
    assert steps_of(store, "trial-000") == [2]


def test_a_better_trial_of_a_resumed_search_replaces_the_exports(store: TrialStore) -> None:
    """A running trial with a better round counts only once it has ended: it may still fail."""
    retention = Retention(store)
    retention.after_end(train(store, "trial-001"))
    assert [trial.name for trial in retention.finish()] == ["trial-001"]
    running = store.trial("trial-003")
    running.add_round({"step": 2, "holdout_loss": 0.3})
    retention.after_end(train(store, "trial-002"))
    assert steps_of(store, "trial-001") == [3]
    retention.after_end(train(store, "trial-003"))
    assert steps_of(store, "trial-001") == [] and steps_of(store, "trial-003") == [2]
    assert not store.folder.exists("trials/trial-001/exports")
    assert [trial.name for trial in retention.finish()] == ["trial-003"]


def test_a_removal_that_was_interrupted_is_finished_later(
    store: TrialStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process ends after any number of removed files and folders; the rest is removed by the next session."""
    first, second = train(store, "trial-000"), train(store, "trial-001")
    remove = Storage.remove
    for allowed in range(4):
        calls = iter(range(100))

        def stop(self: Storage, rel: str, calls: Any = calls, allowed: int = allowed) -> None:
            if next(calls) >= allowed:
                raise KeyboardInterrupt
            remove(self, rel)

        monkeypatch.setattr(Storage, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            Retention(read_store(store.recipe)).finish()
        monkeypatch.setattr(Storage, "remove", remove)
        assert first.is_over and second.is_over
    resumed = read_store(store.recipe)
    assert [trial.name for trial in Retention(resumed).finish()] == ["trial-001"]
    assert steps_of(store, "trial-000") == [] and steps_of(store, "trial-001") == [3]
    files = resumed.folder.list(recursive=True)
    assert not [file for file in files if file.endswith("engine.pt")]


def test_files_that_cannot_be_removed_are_warnings(
    store: TrialStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trial = train(store, "trial-000", status="failed")
    remove = Storage.remove

    def refuse(self: Storage, rel: str) -> None:
        raise StorageError("the disk is read-only")

    monkeypatch.setattr(Storage, "remove", refuse)
    Retention(store).after_end(trial)
    assert "trial-000" in caplog.text and "read-only" in caplog.text and trial.kept
    monkeypatch.setattr(Storage, "remove", remove)
    Retention(store).finish()
    assert not trial.kept and steps_of(store, "trial-000") == []  # a failed trial keeps nothing


def test_an_interrupted_trial_keeps_everything(store: TrialStore) -> None:
    trial = train(store, "trial-000", status="interrupted")
    retention = Retention(store)
    retention.after_end(trial)
    assert retention.finish(export=False) == []
    assert steps_of(store, "trial-000") == [2, 3, 4]
    run_worker(trial_recipe(store.recipe, trial.point, store.folder.path(trial.folder)), resume=True)
    assert [trial.name for trial in retention.finish()] == ["trial-000"]  # a budget in hours ended the search
    store.end(trial, "completed")
    retention.after_end(trial)
    with pytest.raises(CheckpointError, match="optimizer state"):
        run_worker(trial_recipe(store.recipe, trial.point, store.folder.path(trial.folder)), resume=True)


def test_several_trials_and_the_pareto_front_are_kept(store: TrialStore) -> None:
    tree = store.recipe.model_dump(mode="json")
    tree["search"] |= {"keep_best": 2, "metric": ["holdout_loss", "clip_i"]}
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
    front = TrialStore(build_recipe(tree))
    for loss, score in [(0.1, 0.5), (0.2, 0.4), (0.3, 0.4), (0.4, 0.9)]:
        trial = front.add({"optimizer.learning_rate": 1e-3, "method.num_vectors": 1})
        trial.add_round({"step": 1, "holdout_loss": loss, "clip_i": score})
        trial.status = "completed"
    assert [trial.name[-1] for trial in best_trials(front, front.trials)] == ["0", "1", "3"]
    front.trials[0].status = "failed"
    assert [trial.name[-1] for trial in best_trials(front, front.trials)] == ["1", "2", "3"]
