"""Runs cases on the simulated GPU in a separate process: ``python -m simulated_gpu.runs CASE...``

``part:1/4`` names a quarter of the whole matrix, ``special`` all special cases that also a real GPU can run.

Prints a line of JSON per case: its error, the host's waits in one step and their lines of code, the warnings
about CUDA, and the bytes left on the device. The process is separate because torch cannot unregister a
device.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simulated_gpu

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0,1"}
    simulated_gpu.install(devices=2)

import tiny
import torch
from tiny_models import tiny_family

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.driver.build_cache import cache_latents
from dreamfleet.trainers.evaluation.score import score_run
from dreamfleet.trainers.models.vision.discriminator import make_network, save_network
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run import run as run_module
from dreamfleet.trainers.run.run import run_worker
from simulated_gpu import cases
from simulated_gpu.special import SIMULATED_ONLY, SPECIAL

WAITS = ("wait", "send", "race")  # kinds of events that block or corrupt a step


class Watch:
    """`should_stop` of a run, called once per step: records the second step, and stops the run after the third."""

    def __init__(self) -> None:
        self.polls, self.found = 0, []
        self._recording: Any = None

    def __call__(self) -> bool:
        self.polls += 1
        if self.polls == 2:
            self._recording = simulated_gpu.recorded()
            self.found = self._recording.__enter__()
        elif self.polls == 3:
            self.end()
        return self.polls > 3

    def end(self) -> None:
        """Stop recording."""
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None


def workplace(parent: Path, family: str) -> Path:
    """Return the folder of a family's tiny model and images; write it at the first call."""
    folder = parent / family
    if folder.exists():
        return folder
    if family == "sd1":
        tiny.make_tiny_model(folder / "model")
    else:
        tiny_family(family).save_folder(folder / "model")
    tiny.make_images(folder / "pictures", 6, captions=True)
    tiny.make_images(folder / "held", 2, seed=5)
    tiny.make_two_classes(folder / "labelled", 10)
    tiny.make_shapes(folder / "shapes")
    network = make_network(depths=[1, 1], hidden_sizes=[8, 16], classes=["bad", "good"], drop_path=0.0)
    save_network(network, folder / "judge", size=32, dtype=torch.float32, metadata={})
    return folder


def run_row(row: cases.Row, parent: Path) -> dict[str, Any]:
    """Run a row, stop it, resume it to its end, and score it; with `data.cache_dir`, first encode the cache."""
    folder, watch = workplace(parent, row.family), Watch()
    recipe = build_recipe(cases.tree_of(row, folder))
    # Memory planning takes seconds and does not use the device; a special case tests it.
    run_module.settle_engine = lambda recipe, place: (recipe, "not planned")
    try:
        if recipe.data.cache_dir:
            cache_latents(recipe)
        run_worker(recipe, device="cuda", should_stop=watch)
        summary = run_worker(recipe, device="cuda", resume=True)
        if recipe.validation.prompts:  # its exports generate images
            scores = score_run(recipe.output_dir, num_images=1)
            assert scores["num_pictures"] > 0 and scores["clip_i"] is not None, scores
    finally:
        watch.end()
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    waits: dict[str, int] = {}
    for event in watch.found:
        if event.kind in WAITS:
            where = f"{event.kind}: {event.what} @ {event.lines[0] if event.lines else '?'}"
            waits[where] = waits.get(where, 0) + 1
    return {
        "steps": summary.steps,
        "exports": summary.exports,
        "engine": summary.engine,
        "options": row.options,
        "waits": waits,
    }


def run_case(name: str, action: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """Run a case; return its error, and the memory and limits that remain on the device."""
    result: dict[str, Any] = {"case": name, "error": None}
    before, began = simulated_gpu.ext.usage(0)[0], time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result |= action() or {}
        except Exception as error:  # noqa: BLE001 - reported in the output
            kind = "refused: " if isinstance(error, UserError) else ""
            result["error"] = f"{kind}{type(error).__name__}: {error}\n{traceback.format_exc(limit=-12)}"
    result["warnings"] = sorted(
        {str(one.message)[:300] for one in caught if "cuda" in str(one.message).lower()}
    )
    gc.collect()
    result["left"] = simulated_gpu.ext.usage(0)[0] - before
    result["elsewhere"] = simulated_gpu.ext.has_context(1)
    result["limited"] = simulated_gpu.ext.limit_of(0) < simulated_gpu.MEMORY
    return result | {"seconds": round(time.monotonic() - began, 1)}


def _named(words: list[str], rows: list[str]) -> list[str]:
    """Return the names of cases, with ``part:K/N`` and ``special`` replaced by theirs."""
    found: list[str] = []
    for word in words:
        if word.startswith("part:"):
            part, parts = map(int, word.removeprefix("part:").split("/"))
            found += rows[part - 1 :: parts]
        elif word == "special":
            found += [name for name in SPECIAL if name not in SIMULATED_ONLY]
        else:
            found.append(word)
    return found


def main() -> None:
    """Run the named cases."""
    torch.set_num_threads(1)
    gc.freeze()  # excludes imported objects: a run collects garbage several times, a third of a second each
    settle = run_module.settle_engine
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        chosen = cases.with_options(cases.chosen_rows(), workplace(parent, "sd1"))
        rows = {row.name: row for row in [*cases.all_rows(), *chosen]}
        # Stage 3 is last: DeepSpeed replaces torch's linear function permanently and does not free all
        # memory.
        changes = [name for name, row in rows.items() if row.options.get("engine.zero_stage") == 3]
        for case in sorted(_named(sys.argv[1:], list(rows)), key=lambda name: name in changes):
            if case in rows:
                action = functools.partial(run_row, rows[case], parent)
            else:
                run_module.settle_engine = settle
                action = functools.partial(SPECIAL[case], workplace(parent, "sd1"))
            result = run_case(case, action)
            if result["error"] and case in rows:
                result["error"] = f"{rows[case].options}\n{result['error']}"
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
