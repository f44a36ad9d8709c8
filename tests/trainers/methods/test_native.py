"""Test native training with all options: one or two workers, stop and resume, export of the EMA weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.feed import Feed
from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.batches.sources import load_images
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker


def full_tree(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """Return a recipe with buckets, masks, tags, long prompts, text encoder training, zero terminal SNR."""
    shapes = folder / "shapes"
    options = {
        **tiny.SHAPES,
        "method": {"name": "native", "train_text_encoder": True},
        "data__instance_data_dir": str(shapes if shapes.exists() else tiny.make_shapes(shapes)),
        "data__shuffle_caption": True,
        "data__caption_tag_dropout_rate": 0.2,
        "data__caption_dropout_rate": 0.2,
        "data__caption_prefix": "a photo,",
        "data__keep_tokens": 1,
        "model__max_token_length": 150,
        "model__zero_terminal_snr": True,
        "model__prediction_type": "v_prediction",
        **changes,
    }
    return recipe_tree(folder, run, **options)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, broken = full_tree(tmp_path, "straight"), full_tree(tmp_path, "broken")
    run_worker(build_recipe(straight))
    assert run_worker(build_recipe(broken), should_stop=tiny.Stop(2)).exit_reason == "interrupted"
    run_worker(build_recipe(broken), resume=True)
    assert_same(final_state(straight), final_state(broken))


def test_two_workers_together_see_the_samples_of_one(tmp_path: Path) -> None:
    recipe = build_recipe(full_tree(tmp_path, "run", train__train_batch_size=2))
    parts = assemble(recipe, DistributedContext())
    assert parts.global_batch == 4

    def feed_of(rank: int) -> Feed:
        return Feed(
            PlanShare(parts.feed.plan, 2, DistributedContext(rank, 2)),
            instances=parts.sets.instances,
            images=load_images(parts.sets.instances, parts.model, recipe.data, seed=7),
            method=parts.method,
            data=recipe.data,
        )

    ranks = [feed_of(0), feed_of(1)]
    for step in range(8):
        whole = [parts.feed.batch(step, micro) for micro in range(2)]
        split = [feed.batch(step, rank) for rank, feed in enumerate(ranks)]
        for name in ("latents", "noise", "timesteps", "mask"):
            assert torch.equal(torch.cat([b[name] for b in whole]), torch.cat([b[name] for b in split])), name
        assert [p for b in whole for p in b["prompts"]] == [p for b in split for p in b["prompts"]]


def test_the_average_is_exported_in_half_precision(tmp_path: Path) -> None:
    tree = full_tree(tmp_path, "run", train__save_precision="fp16", train__export_formats=["safetensors"])
    summary = run_worker(build_recipe(tree))
    assert summary.exports == ["run.safetensors", "run.yaml"]  # .yaml: the model predicts velocity
    state, _ = read_safetensors(Path(tree["output_dir"]) / "exports" / "run.safetensors")
    found = Checkpoints(Storage(tree["output_dir"])).load_latest()
    assert found is not None
    name = "unet.conv_in.weight"
    written = state["model.diffusion_model.input_blocks.0.0.weight"]
    assert written.dtype == torch.float16
    assert torch.equal(written, found.engine["ema"][name].half())
    assert not torch.equal(written, found.learned[name].half())


def make_prompts(parts: Parts, steps: int) -> set[str]:
    return {prompt for step in range(steps) for prompt in parts.feed.batch(step)["prompts"]}


def test_prompts_are_captions_then_the_prompt_of_the_set_then_file_names(tmp_path: Path) -> None:
    images = tiny.make_images(tmp_path / "some", 3, captions=True)
    (images / "000.txt").unlink()
    (images / "001.txt").unlink()
    (images / "001.png").rename(images / "01-a red house.png")
    options = {"method": {"name": "native"}, "data__instance_data_dir": str(images)}
    with_prompt = assemble(build_recipe(tiny.make_recipe(tmp_path, **options)), DistributedContext())
    assert make_prompts(with_prompt, 3) == {"a photo of sks cat", "cat, tag2, round, soft"}
    tree = tiny.make_recipe(tmp_path, **options, data__instance_prompt=None)
    with pytest.raises(DataError, match=r"000\.png") as caught:
        assemble(build_recipe(tree), DistributedContext())
    assert "a red house.png" in str(caught.value)  # a file name is not used as a caption by default
    tree["data"]["caption_from_filename"] = True
    with pytest.raises(DataError, match=r"000\.png"):
        assemble(build_recipe(tree), DistributedContext())
    (images / "000.png").unlink()
    assert make_prompts(assemble(build_recipe(tree), DistributedContext()), 3) == {
        "a red house",
        "cat, tag2, round, soft",
    }
