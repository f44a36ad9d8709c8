"""Test the choice of engine for the machines of a run, and DeepSpeed JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from dreamfleet.datasets.errors import RecipeError, ResourceError
from dreamfleet.trainers.config.deepspeed import BUCKET
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.engines.zero_setup import zero_config
from dreamfleet.trainers.memory import engine_selection, plan
from dreamfleet.trainers.memory.inputs import Counts, Pass
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe
from dreamfleet.trainers.run.run import run_worker

GIB = 2**30
GPU = DistributedContext(device=torch.device("cuda"))


@pytest.fixture
def sd15(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return a recipe with the counts of SD 1.5 in bf16: 0.86 billion weights, 2 GiB of activations."""
    step = Pass(held=GIB, activations=2 * GIB, together=5 * GIB)
    counts = Counts(
        (860_000_000,), frozen=GIB // 2, model=4 * GIB, full=step, half=step, bucket=BUCKET, mixed=True
    )
    monkeypatch.setattr(plan, "count_run", lambda recipe, method, images: counts)
    return build_recipe(tiny.make_recipe(tmp_path, train__mixed_precision="bf16"))


def fake_gpu(monkeypatch: pytest.MonkeyPatch, gib: float, host: float = 64) -> list[float]:
    """Simulate a GPU with ``gib`` of 80 GiB free and a host with ``host`` GiB of memory.

    Return the list to which the memory fractions set in torch are appended.
    """
    held: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * GIB), 80 * GIB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: held.append(fraction)
    )
    monkeypatch.setattr(engine_selection, "host_memory", lambda: int(host * GIB))
    return held


@pytest.mark.parametrize(
    ("gib", "stage", "offload"), [(80, "auto", "none"), (8, 2, "cpu")], ids=["large card", "8 GiB"]
)
def test_auto_chooses_the_cheapest_that_fits_the_gpu(
    sd15: Recipe, monkeypatch: pytest.MonkeyPatch, gib: float, stage: Any, offload: str
) -> None:
    held = fake_gpu(monkeypatch, gib)
    settled, reason = engine_selection.settle_engine(sd15, GPU)
    assert (settled.engine.zero_stage, settled.engine.offload_optimizer_device) == (stage, offload)
    assert f"of {gib + (0.5 if gib < 80 else 0):.1f} GiB on the GPU" in reason
    assert held == [1.0], "the limit of an earlier run is lifted"
    assert yaml.safe_load(settled.to_yaml())["engine"]["zero_stage"] == stage


def test_a_memory_limit_applies_to_plan_and_run_without_the_cuda_context(
    sd15: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = fake_gpu(monkeypatch, 79)
    limited = sd15.model_copy(update={"engine": sd15.engine.model_copy(update={"gpu_memory": "8GiB"})})
    settled, reason = engine_selection.settle_engine(limited, GPU)
    assert settled.engine.zero_stage == 2 and "of 8.0 GiB" in reason
    assert held == [pytest.approx(7.5 / 80)]
    explicit = limited.model_copy(update={"engine": limited.engine.model_copy(update={"zero_stage": 3})})
    assert engine_selection.settle_engine(explicit, GPU) == (explicit, "set in the recipe") and len(held) == 2


def test_an_error_of_the_planner_does_not_end_the_run(
    sd15: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpu(monkeypatch, 8)

    def fail(recipe: Recipe, method: Any, images: Any) -> Counts:
        raise NotImplementedError("aten::odd has no fake kernel\nmore lines")

    monkeypatch.setattr(plan, "count_run", fail)
    settled, reason = engine_selection.settle_engine(sd15, GPU)
    assert settled.engine.zero_stage == "auto" and "odd" in reason and "more" not in reason
    assert [record.levelname for record in caplog.records if "cannot be planned" in record.message] == [
        "WARNING"
    ]


def test_a_share_of_a_gpu_is_a_limit_as_well(sd15: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    held = fake_gpu(monkeypatch, 80)
    tenth = DistributedContext(device=torch.device("cuda"), gpu_share=0.1)
    settled, reason = engine_selection.settle_engine(sd15, tenth)
    assert settled.engine.zero_stage == 2 and "of 8.0 GiB on the GPU" in reason
    assert held == [pytest.approx(7.5 / 80)]
    limited = sd15.model_copy(update={"engine": sd15.engine.model_copy(update={"gpu_memory": "40GiB"})})
    assert "of 8.0 GiB" in engine_selection.settle_engine(limited, tenth)[1], "the smaller counts"
    with pytest.raises(ResourceError, match=r"0.005 of a GPU.*less than the CUDA"):
        engine_selection.settle_engine(sd15, DistributedContext(device=torch.device("cuda"), gpu_share=0.005))


def test_the_error_when_nothing_fits_names_needs_and_remedies(
    sd15: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, 2)
    with pytest.raises(ResourceError) as error:
        engine_selection.settle_engine(sd15, GPU)
    for part in (
        "no engine choice fits 2.5 GiB per GPU",
        "ZeRO-2, optimizer on host",
        "data.resolution below 32",
    ):
        assert part in str(error.value)
    fake_gpu(monkeypatch, 8, host=4)
    with pytest.raises(ResourceError, match=r"4\.0 GiB"):
        engine_selection.settle_engine(sd15, GPU)


def test_no_memory_is_planned_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dreamfleet.trainers.memory.plan", None)
    summary = run_worker(build_recipe(tiny.make_recipe(tmp_path, train__max_train_steps=1)))
    assert summary.engine == "torch (no GPU)"
    assert "# engine torch (no GPU)" in (tmp_path / "run/recipe.yaml").read_text()


def test_a_run_that_cannot_be_planned_is_trained_by_torch(
    sd15: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, 8)
    unknown = sd15.model.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / "model.ckpt")})
    settled, reason = engine_selection.settle_engine(sd15.model_copy(update={"model": unknown}), GPU)
    assert settled.engine.zero_stage == "auto" and "dreamfleet convert" in reason


def test_an_invalid_memory_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"engine\.gpu_memory: .*'lots'"):
        build_recipe(tiny.make_recipe(tmp_path, engine__gpu_memory="lots"))


def with_file(folder: Path, tree: dict[str, Any], **changes: Any) -> Recipe:
    (folder / "ds.json").write_text(json.dumps(tree))
    changed = tiny.make_recipe(folder, **{"engine__deepspeed_config": "ds.json", **changes})
    return load_recipe(tiny.write_recipe(folder / "recipe.yaml", changed))


AGREES: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": "auto",
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 6},
        "reduce_bucket_size": 1234,
        "round_robin_gradients": True,
    },
    "wall_clock_breakdown": True,
    "zero_force_ds_cpu_optimizer": "auto",
}


def test_a_deepspeed_file_sets_stage_and_offload_and_passes_other_keys_on(tmp_path: Path) -> None:
    recipe = with_file(tmp_path, AGREES).with_deepspeed_file()
    engine = recipe.engine
    assert (engine.zero_stage, engine.offload_optimizer_device, engine.pin_memory) == (2, "cpu", False)
    assert recipe.with_deepspeed_file() == recipe, "settled once is settled"
    config = zero_config(engine, mixed_precision="no", max_grad_norm=1.0, num_micros=3, num_params=10)
    assert config == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1234,
            "allgather_bucket_size": 10,
            "round_robin_gradients": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 6},
        },
    }


def test_a_deepspeed_file_sets_nvme_path_and_group_size(tmp_path: Path) -> None:
    block = {"device": "nvme", "nvme_path": "/fast", "buffer_count": 6}
    tree = {"zero_optimization": {"stage": 3, "sub_group_size": 5, "offload_optimizer": block}}
    engine = with_file(tmp_path, tree).with_deepspeed_file().engine
    assert (engine.offload_optimizer_device, engine.nvme_path) == ("nvme", "/fast")
    config = zero_config(
        engine, mixed_precision="no", max_grad_norm=1.0, num_micros=1, num_params=10, swap_folder="/fast/own"
    )["zero_optimization"]
    assert config["sub_group_size"] == 5
    assert config["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast/own", "buffer_count": 6}
    tree["zero_optimization"]["offload_param"] = {**block, "nvme_path": "/slow"}
    with pytest.raises(RecipeError, match="nvme_path: '/slow'"):
        with_file(tmp_path, tree, train__mixed_precision="bf16").with_deepspeed_file()


@pytest.mark.parametrize(
    ("tree", "changes", "message"),
    [
        ({"train_batch_size": 8}, {}, r"train_batch_size: 8 .*: 2 "),
        ({"gradient_clipping": 0.5}, {}, r"gradient_clipping: 0.5 .*optimizer.max_grad_norm: 1.0"),
        (
            {"bf16": {"enabled": True}},
            {},
            r"bf16.enabled: True .*train.mixed_precision",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, {}, r"scheduler.type: 'WarmupLR'"),
        ({"optimizer": {"type": "Lamb"}}, {}, r"optimizer.type: 'Lamb'"),
        (
            {"zero_optimization": {"stage": 2}},
            {"engine__zero_stage": 3},
            r"stage: 2 .*engine.zero_stage: 3",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "needs zero_stage: 3"),
        ({"steps_per_print": 1}, {}, "no zero_optimization.stage"),
        ([], {}, "JSON object"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_an_early_error(
    tmp_path: Path, tree: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check_inputs(with_file(tmp_path, tree, **changes))


def test_a_missing_deepspeed_file_is_an_error(tmp_path: Path) -> None:
    recipe = build_recipe(tiny.make_recipe(tmp_path, engine__deepspeed_config=str(tmp_path / "absent.json")))
    with pytest.raises(RecipeError, match=r"absent\.json .*JSON"):
        check_inputs(recipe)


def test_a_job_packages_the_deepspeed_file(tmp_path: Path) -> None:
    from dreamfleet.cluster.jobs.package import pack

    parcel = pack(with_file(tmp_path, AGREES, output_dir="s3://bucket/run"))
    assert parcel.recipe.engine.deepspeed_config == "./inputs/ds.json" and "inputs/ds.json" in parcel.files
