"""The previews that a search shows of a trial."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from searches import make_recipe, make_trials

from dreamfleet.tune.sheet import trial_previews
from dreamfleet.tune.trial_store import TrialStore


def shown_red(store: TrialStore, number: int) -> int | None:
    """Return the red value of the shown preview, which is the step that it was made at."""
    cells = trial_previews(store.folder, store.trials[number])
    return cells[0].image.getpixel((0, 0))[0] if cells else None  # type: ignore[index]


def make_store(folder: Path, steps: list[int]) -> TrialStore:
    store = TrialStore(make_recipe(folder), make_trials())
    for trial in store.trials:
        samples = folder / trial.folder / "samples"
        samples.mkdir(parents=True)
        for step in steps:
            Image.new("RGB", (16, 16), (step, 0, 0)).save(samples / f"step-{step:06d}.png")
            cell = {"prompt": "a <x>", "seed": 0, "row": 0, "column": 0, "width": 16, "height": 16}
            (samples / f"step-{step:06d}.jsonl").write_text(json.dumps(cell))
    return store


def test_the_previews_are_those_of_the_best_round(tmp_path: Path) -> None:
    store = make_store(tmp_path, [0, 10, 20])
    assert shown_red(store, 0) == 20
    store.trials[0].rounds[1]["holdout_loss"] = 0.1  # the loss rose from step 10 to step 20
    assert shown_red(store, 0) == 10


def test_without_previews_of_the_best_round_the_nearest_are_shown(tmp_path: Path) -> None:
    store = make_store(tmp_path, [0, 12, 40])
    assert shown_red(store, 0) == 12  # the best round is step 20
    assert shown_red(store, 2) == 12  # step 10


def test_a_trial_without_a_measured_round_shows_none(tmp_path: Path) -> None:
    store = make_store(tmp_path, [0])
    assert shown_red(store, 3) is None and shown_red(store, 4) is None
