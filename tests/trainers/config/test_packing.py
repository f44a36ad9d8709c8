"""Tests which recipes can share a process, and which of them with each other."""

from typing import Any, ClassVar, Literal

import pytest

from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.config.packing import find_unpackable, pack_key
from dreamfleet.trainers.recipe import Recipe, build_recipe

TEXTUAL_INVERSION = {"name": "textual_inversion", "placeholder_token": "<toy>"}
LORA = {"name": "dreambooth", "lora_rank": 4}
PACKED = [
    TEXTUAL_INVERSION,
    {"name": "prompt_tuning", "placeholder_token": "toy"},
    {"name": "hypernetwork"},
    {"name": "hypernetwork", "use_dropout": True, "layer_structure": [1, 2, 2, 1]},
    {"name": "hypernetwork", "activation_func": "softmax"},
    LORA,
    {"name": "native", "lora_rank": 8, "lora_dropout": 0.1, "train_text_encoder": True},
]
ALONE = [
    {"name": "dreambooth"},
    {"name": "native"},
    {"name": "aesthetic_gradients"},
    {"name": "discriminator", "classes": ["other", "good"]},
]


def recipe(method: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    tree = {
        "method": method or TEXTUAL_INVERSION,
        "data": {"instance_data_dir": "images"},
        "output_dir": "runs/one",
    }
    return build_recipe(tree | sections)


@pytest.mark.parametrize("method", PACKED, ids=str)
def test_small_methods_pack(method: dict[str, Any]) -> None:
    assert find_unpackable(recipe(method)) is None


@pytest.mark.parametrize("method", ALONE, ids=str)
def test_others_name_the_method(method: dict[str, Any]) -> None:
    assert (find_unpackable(recipe(method)) or "").startswith(f"method.name: {method['name']} ")


def test_every_method_is_covered() -> None:
    assert {method["name"] for method in PACKED + ALONE} == set(METHODS.names())


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"engine": {"zero_stage": 2}}, "engine.zero_stage: 2"),
        ({"scaling": {"num_workers": 2}}, "scaling.num_workers: 2"),
        ({"engine": {"torch_compile": True}}, "engine.torch_compile"),
        ({"optimizer": {"fused_backward": True, "max_grad_norm": 0}}, "optimizer.fused_backward"),
        (
            {"method": {**LORA, "lora_dropout": 0.1}, "train": {"gradient_checkpointing": True}},
            "train.gradient_checkpointing",
        ),
        (
            {
                "method": {"name": "hypernetwork", "use_dropout": True, "layer_structure": [1, 2, 2, 1]},
                "train": {"gradient_checkpointing": True},
            },
            "train.gradient_checkpointing",
        ),
    ],
)
def test_settings_that_need_a_process_alone(sections: dict[str, Any], named: str) -> None:
    assert (find_unpackable(recipe(**sections)) or "").startswith(named)


def test_all_reasons_are_given_together() -> None:
    found = find_unpackable(
        recipe({"name": "native"}, engine={"torch_compile": True}, scaling={"num_workers": 2})
    )
    assert found is not None
    for named in ("lora_rank", "engine.torch_compile", "scaling.num_workers"):
        assert named in found


def test_checkpointing_without_dropout_packs() -> None:
    assert find_unpackable(recipe(LORA, train={"gradient_checkpointing": True})) is None


class ToyConfig(MethodConfig):
    implementation: ClassVar[str] = "toy:Toy"
    summary: ClassVar[str] = "Trains a toy."
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)
    name: Literal["toy"] = "toy"


def test_a_method_of_another_package_packs_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    METHODS.register("toy")(ToyConfig)
    try:
        toy = recipe({"name": "toy"})
        assert "method.name: toy" in (find_unpackable(toy) or "")
        monkeypatch.setattr(ToyConfig, "packs", True)
        assert find_unpackable(toy) is None
    finally:
        METHODS.unregister("toy")


def test_key_ignores_what_a_slot_decides() -> None:
    one = recipe()
    for other in (
        recipe({**TEXTUAL_INVERSION, "num_vectors": 4}),
        recipe({"name": "hypernetwork"}),
        recipe(train={"train_batch_size": 4, "seed": 3}, optimizer={"learning_rate": 1e-3}),
        recipe(engine={"use_ema": True}),
    ):
        assert hash(pack_key(one)) == hash(pack_key(other))
        assert pack_key(one) == pack_key(other)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"clip_skip": 2}},
        {"model": {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-2-1"}},
        {"train": {"mixed_precision": "bf16"}},
        {"train": {"gradient_checkpointing": True}},
        {"engine": {"channels_last": True}},
        {"engine": {"allow_tf32": False}},
        {"engine": {"gpu_memory": "12GiB"}},
        {"scaling": {"use_gpu": False}},
    ],
    ids=str,
)
def test_key_differs(sections: dict[str, Any]) -> None:
    assert pack_key(recipe(**sections)) != pack_key(recipe())
