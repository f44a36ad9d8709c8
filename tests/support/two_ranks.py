"""One of two ranks that run all cases of test_ranks.py in the same processes; writes the results as JSON.

The ranks have different working folders, so ``/proc/self/cwd/x`` is a different file for each of them, as on
two machines with different disks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiny
import torch
import torch.distributed as dist

from dreamfleet.datasets.errors import DataError
from dreamfleet.trainers.distributed import shared_table
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.distributed.shared_table import share_table
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.run import run_worker

APART = "/proc/self/cwd"  # a folder that differs between the ranks
PRIOR = {
    "name": "dreambooth",
    "with_prior_preservation": True,
    "num_class_images": 5,
    "prior_generation_steps": 2,
    "sample_batch_size": 2,
}
DISCRIMINATOR = {**tiny.DISCRIMINATOR, "holdout_per_class": 17}  # two batches of held-out images


def whole_recipe(folder: Path, run: str, *, batch: int, **changes: Any) -> dict[str, Any]:
    """Return a recipe whose previews (several batches), held-out images and class images are all distributed."""
    validation = {
        "prompts": ["a sks cat", "a cat"],
        "num_images": 3,
        "num_inference_steps": 2,
        "steps": 2,
        "holdout": str(folder / "holdout"),
    }
    changes = {"method": PRIOR, "validation": validation, "train__train_batch_size": batch, **changes}
    return tiny.make_recipe(folder, output_dir=str(folder / run / "run"), **changes)


def make_folders(folder: Path) -> None:
    """Write the model and the images that both ranks share, and for each rank a folder with different files."""
    tiny.make_recipe(folder)
    tiny.make_images(folder / "holdout", 3, seed=5)
    tiny.make_two_classes(folder / "two", 44)
    for rank in (0, 1):
        own = folder / f"rank-{rank}"
        tiny.make_images(own / "fewer", 4)
        tiny.make_images(own / "changed", 4)
        tiny.make_tiny_model(own / "model", seed=rank)
        tiny.make_images(own / "class", 5 * rank)
        (own / "word.pt").write_bytes(b"the same")
        (own / "templates.txt").write_text(f"a photo of [name], {rank}\n")
    (folder / "rank-0/word.pt.optim").write_bytes(b"of one rank")
    (folder / "rank-1/fewer/002.png").unlink()
    changed = folder / "rank-1/changed/001.png"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")  # of the same size


def situations(folder: Path, distributed: DistributedContext) -> dict[str, Callable[[], Any]]:
    """Return the cases by name."""

    def build(**changes: Any) -> None:
        parts = assemble(build_recipe(tiny.make_recipe(folder, **changes)), distributed)
        parts.engine.close()

    def fails(rank: int, error: Exception) -> Callable[[], int]:
        def work() -> int:
            if distributed.rank == rank:
                raise error
            return distributed.rank

        return work

    def run(name: str, **changes: Any) -> dict[str, Any]:
        tree = whole_recipe(folder, name, batch=1, **changes)
        summary = run_worker(build_recipe(tree), rank=distributed.rank, world=2)
        return {"exports": summary.exports, "exit_reason": summary.exit_reason}

    def table(place: str) -> dict[str, Any]:
        tempfile.tempdir = place
        made = pa.table({"row": np.arange(100_000)}) if distributed.rank == 0 else None
        before = pa.total_allocated_bytes()
        found = share_table(made, distributed)
        held = pa.total_allocated_bytes() - before
        tempfile.tempdir = None
        distributed.wait()
        left = [path.name for path in Path(place).glob("dreamfleet-index-*")]
        return {
            "rows": found.num_rows,
            "sum": int(np.sum(found["row"].to_numpy())),
            "held": held,
            "left": left,
        }

    def asks(thrown: Exception | None) -> Any:
        """Answer the question of a generator on every rank; on rank 1, throw an error into it instead."""

        def question() -> Generator[str, int, int]:
            return (yield "a pass")

        work = distributed.generate_on_every_rank(question())
        assert next(work) == "a pass"
        try:
            return work.throw(thrown) if thrown and distributed.rank == 1 else work.send(distributed.rank)
        except StopIteration as end:
            return end.value

    def resume_apart() -> None:
        tree = tiny.make_recipe(folder, output_dir=f"{APART}/run", train__train_batch_size=1)
        run_worker(build_recipe(tree), rank=distributed.rank, world=2, resume=True)

    word = {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"}
    return {
        "value of rank 0": lambda: distributed.on_rank_0(lambda: [distributed.rank]),
        "error on rank 0": lambda: distributed.on_rank_0(fails(0, DataError("no such image"))),
        "fault on rank 0": lambda: distributed.on_rank_0(fails(0, KeyError("a bug"))),
        "error on rank 1": lambda: distributed.on_every_rank(fails(1, DataError("a torn image"))),
        "error on rank 1 in a generator": lambda: asks(DataError("a torn image")),
        "own value": lambda: distributed.on_every_rank(lambda: distributed.rank),
        "own value of a generator": lambda: asks(None),
        "order": lambda: distributed.collect([f"{number}" for number in distributed.share(5)]),
        "order on rank 0": lambda: distributed.collect(list(distributed.share(5)), everywhere=False),
        "a table in a common folder": lambda: table(str(folder)),
        "a table on one disk": lambda: table(APART),
        "whole run": lambda: run("two"),
        "discriminator": lambda: run(
            "judge",
            method=DISCRIMINATOR,
            validation={"steps": 2},
            data__instance_data_dir=str(folder / "two"),
        ),
        "an image is missing": lambda: build(data__instance_data_dir=f"{APART}/fewer"),
        "an image differs": lambda: build(data__instance_data_dir=f"{APART}/changed"),
        "another model": lambda: build(model__pretrained_model_name_or_path=f"{APART}/model"),
        "other templates": lambda: build(method={**word, "template_file": f"{APART}/templates.txt"}),
        "moments on one disk": lambda: build(
            method={
                "name": "textual_inversion",
                "placeholder_token": "<x>",
                "initial_embedding": f"{APART}/word.pt",
            }
        ),
        "class images on one disk": lambda: build(method=PRIOR, data__class_data_dir=f"{APART}/class"),
        "no data on one disk": lambda: build(data__instance_data_dir=f"{APART}/only-on-1"),
        "a checkpoint on one disk": resume_apart,
    }


def main(folder: Path, rank: int) -> None:
    """Run every case and write the results."""
    os.chdir(folder / f"rank-{rank}")
    if rank == 1:
        tiny.make_images(Path("only-on-1"), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    shared_table.MAPPED_BYTES, shared_table.SENT_AT_ONCE = 0, 300_000
    distributed = DistributedContext(rank, 2)
    if rank == 0:  # a checkpoint that rank 1 cannot see
        run_worker(
            build_recipe(tiny.make_recipe(folder, output_dir=f"{APART}/run", train__max_train_steps=2))
        )
    distributed.wait()
    seen: dict[str, Any] = {}
    for name, go in situations(folder, distributed).items():
        try:
            seen[name] = {"value": go()}
        except Exception as error:  # noqa: BLE001 - reported in the results
            seen[name] = {"error": type(error).__name__, "message": str(error)}
        Path("seen.json").write_text(json.dumps(seen))
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
