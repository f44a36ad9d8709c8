"""Tests of what the settings of each trainer become, with the differences between trainers made visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trainer_configs
from trainer_configs import CONFIGS

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.imports.rules import Effect
from dreamfleet.trainers.imports.translate import Imported, import_files


def imported(folder: Path, *configs: tuple[str, str], **options: Any) -> Imported:
    """Import configs, written into a folder; those after the first are named by it."""
    for name, text in configs:
        (folder / name).write_text(text)
    return import_files([str(folder / configs[0][0])], **options)


def values(found: Imported) -> dict[str, Any]:
    return {line.key: line.value for line in found.lines}


def left(found: Imported, key: str) -> str:
    return next(f"{entry.effect}: {entry.reason}" for entry in found.left if entry.key == key)


def test_kohya_command_line(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.KOHYA)
    recipe = values(found)
    assert recipe["method.name"] == "native"
    assert (recipe["method.lora_rank"], recipe["method.lora_alpha"]) == (8, 4)
    assert "ff.net.2" in recipe["method.lora_target_modules"]  # kohya's LoRA adapts more than attention
    assert "q_proj" in recipe["method.lora_target_modules"]  # and the text encoder, trained by default
    assert recipe["method.train_text_encoder"] is True
    assert recipe["model.pretrained_model_name_or_path"] == "runwayml/stable-diffusion-v1-5"  # from $MODEL
    assert recipe["data.resolution"] == 512 and recipe["data.latent_sampling"] == "once"
    assert recipe["optimizer.adam_beta2"] == 0.99 and recipe["optimizer.adam_weight_decay"] == 0.1
    assert recipe["train.mixed_precision"] == "bf16"  # the launcher's
    assert recipe["output_dir"] == "out/cat"
    assert "changes results: unknown key" in left(found, "random_colours")
    assert recipe["scaling.num_workers"] == 1


def test_kohya_folders_inherit_their_options(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.KOHYA_TRAINING, trainer_configs.KOHYA_DATASET)
    recipe = values(found)
    first, second = recipe["data.sets"]
    assert (first["prompt"], second["prompt"]) == ("sks cat", "a cat")
    assert first["repeats"] == 5 and "repeats" not in second
    assert recipe["data.keep_tokens"] == 2 and "keep_tokens" not in first  # the dataset's, over [general]'s 1
    assert second["keep_tokens"] == 3 and "caption_extension" not in second
    assert recipe["train.train_batch_size"] == 3
    defaults = {line.key for line in found.written_defaults}
    assert "method.lora_alpha" in defaults and recipe["method.lora_alpha"] == 1


def test_kohya_default_length_and_rate_are_written_out(tmp_path: Path) -> None:
    text = (
        '[a]\npretrained_model_name_or_path = "x/y"\ntrain_data_dir = "img"\nsave_model_as = "safetensors"\n'
    )
    found = imported(tmp_path, ("db.toml", text + "stop_text_encoder_training = -1\n"))
    recipe = values(found)
    assert recipe["method.name"] == "dreambooth" and "method.train_text_encoder" not in recipe
    defaults = {line.key: line.value for line in found.written_defaults}
    assert defaults == {
        "train.max_train_steps": 1600,
        "optimizer.learning_rate": 2e-6,
        "data.caption_extension": [".caption"],
    }


def test_gui_epochs_percentages_and_extra_options(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.KOHYA_GUI)
    recipe = values(found)
    assert recipe["train.num_train_epochs"] == 4
    assert recipe["optimizer.max_grad_norm"] == 0  # from the additional parameters
    assert recipe["data.resolution"] == 624  # the side of a square as large as 512 x 768
    assert recipe["train.noise_offset"] == 0.05 and "train.multires_noise_iterations" not in recipe
    assert "set optimizer.lr_warmup_steps" in left(found, "lr_warmup")
    name, text = trainer_configs.KOHYA_GUI
    with_steps = imported(tmp_path, (name, text.replace('"max_train_steps": 0', '"max_train_steps": 500')))
    assert values(with_steps)["optimizer.lr_warmup_steps"] == 50  # 10 % of 500
    assert "train.num_train_epochs" not in values(with_steps)


def test_onetrainer(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.ONETRAINER)
    recipe = values(found)
    assert recipe["train.num_train_epochs"] == 3 and recipe["data.repeats"] == 2
    assert recipe["model.clip_skip"] == 2  # one layer is skipped there
    assert recipe["optimizer.lr_scheduler"] == "constant_with_warmup"
    assert "q_proj" not in recipe["method.lora_target_modules"]  # the text encoder is not trained
    assert recipe["optimizer.lr_warmup_steps"] == 5  # 10 batches, 2 of them for each optimizer step
    assert recipe["train.snr_gamma"] == 5.0 and recipe["method.lora_alpha"] == 1.0
    assert "changes results" in left(found, "perturbation_noise_weight")


def test_folders_that_differ_are_no_contradiction(tmp_path: Path) -> None:
    name, text = trainer_configs.ONETRAINER
    two = text.replace(
        '"concepts": [', '"concepts": [{"path": "other", "image": {"enable_random_flip": false}}, '
    )
    found = imported(tmp_path, (name, two))
    assert values(found)["data.random_flip"] is False and len(values(found)["data.sets"]) == 2
    assert "that of concepts.0" in left(found, "concepts.1.image.enable_random_flip")


def test_onetrainer_of_another_version_and_model(tmp_path: Path) -> None:
    name, text = trainer_configs.ONETRAINER
    newer = imported(tmp_path, (name, text.replace('"__version": 11', '"__version": 12')))
    assert "a newer format" in left(newer, "__version")
    with pytest.raises(UserError, match="FLUX_DEV_1 blocks the import; dreamfleet trains Stable Diffusion"):
        imported(tmp_path, (name, text.replace("STABLE_DIFFUSION_15", "FLUX_DEV_1")))


def test_onetrainer_of_an_old_format(tmp_path: Path) -> None:
    text = """{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "a/b",
        "optimizer": "ADAMW", "optimizer_beta2": 0.98, "train_text_encoder": false, "unet_learning_rate": 2e-4,
        "min_snr_gamma": 3, "epochs": 2}"""
    recipe = values(imported(tmp_path, ("old.json", text)))
    assert recipe["optimizer.adam_beta2"] == 0.98 and recipe["optimizer.learning_rate"] == 2e-4
    assert "method.train_text_encoder" not in recipe and recipe["train.snr_gamma"] == 3


def test_simpletuner_reads_its_backends(tmp_path: Path) -> None:
    recipe = values(imported(tmp_path, *CONFIGS["simpletuner"]))
    assert recipe["data.repeats"] == 5  # 4 there means four more uses
    assert recipe["data.instance_prompt"] == "a sks cat" and recipe["data.use_captions"] is False
    assert recipe["train.train_batch_size"] == 4 and recipe["data.center_crop"] is False


def test_ai_toolkit_counts_batches(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.AI_TOOLKIT)
    recipe = values(found)
    assert recipe["train.max_train_steps"] == 500 and recipe["train.gradient_accumulation_steps"] == 4
    assert recipe["validation.prompts"] == ["sks on the beach"]
    assert "the largest, 768" in left(found, "datasets.*.resolution")


def test_diffusers_command_line(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.DIFFUSERS)
    recipe = values(found)
    assert recipe["method.name"] == "dreambooth" and recipe["optimizer.name"] == "adamw8bit"
    assert recipe["data.instance_prompt"] == "a photo of sks cat" and recipe["data.use_captions"] is False
    assert recipe["train.noise_offset"] == 0.1
    assert {line.key for line in found.written_defaults} == {"data.center_crop"}
    assert "# " in next(line for line in found.text.splitlines() if "noise_offset" in line)


def test_webui_settings(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.WEBUI)
    recipe = values(found)
    assert recipe["optimizer.learning_rate"] == "0.005:100, 1e-3:1000"
    assert recipe["method.template_file"] == "subject" and recipe["optimizer.max_grad_norm"] == 0
    assert [entry.key for entry in found.blocking] == ["model_name"]


def test_paths_of_another_machine_are_reported_and_mapped(tmp_path: Path) -> None:
    (tmp_path / "here" / "cats" / "sks").mkdir(parents=True)
    configs = (trainer_configs.KOHYA_TRAINING, trainer_configs.KOHYA_DATASET)
    assert dict(imported(tmp_path, *configs).missing) == {
        "datasets.0.subsets.0.image_dir": "D:/cats/sks",
        "datasets.0.subsets.1.image_dir": "D:/cats/other",
    }
    found = imported(tmp_path, *configs, maps=[f"d:\\={tmp_path}/here"])
    assert dict(found.missing) == {"datasets.0.subsets.1.image_dir": f"{tmp_path}/here/cats/other"}
    assert values(found)["data.sets"][0]["source"] == f"{tmp_path}/here/cats/sks"
    with pytest.raises(UserError, match="no path in the config begins with '/other'"):
        imported(tmp_path, *configs, maps=["/other=/x"])
    with pytest.raises(UserError, match="write OLD=NEW"):
        imported(tmp_path, *configs, maps=["/other"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "full_fp16 = true\nfull_bf16 = true\n",
            "full_fp16 and full_bf16: weights are kept in one precision",
        ),
        ("use_8bit_adam = true\noptimizer_type = 'Adafactor'\n", "both mean optimizer.name"),
    ],
)
def test_contradictory_settings_are_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        imported(tmp_path, ("a.toml", "network_dim = 4\ntrain_data_dir = 'img'\n" + text))


def test_a_dataset_config_alone_blocks_because_it_names_no_model(tmp_path: Path) -> None:
    found = imported(tmp_path, trainer_configs.KOHYA_DATASET)
    assert [entry.key for entry in found.blocking] == ["(model)"]


def test_min_snr_of_a_v_prediction_is_explained(tmp_path: Path) -> None:
    name, text = trainer_configs.KOHYA
    found = imported(tmp_path, (name, text.rstrip() + " --v_parameterization\n"))
    assert "SNR + 1" in next(line for line in found.text.splitlines() if line.startswith("  snr_gamma: 5"))


def test_optimizer_that_does_not_exist_blocks(tmp_path: Path) -> None:
    name, text = trainer_configs.KOHYA
    found = imported(tmp_path, (name, text.replace("--optimizer_type=AdamW", "--optimizer_type=DAdaptSGD")))
    assert [entry.key for entry in found.blocking] == ["optimizer_type"]
    assert "it stays 'adamw'" in found.blocking[0].reason


def test_options_of_an_optimizer(tmp_path: Path) -> None:
    name, text = trainer_configs.KOHYA
    text = text.replace("--optimizer_type=AdamW ", "--optimizer_type=Prodigy ").replace(
        '"weight_decay=0.1"', "d_coef=2 foo=1"
    )
    found = imported(tmp_path, (name, text))
    assert values(found)["optimizer.name"] == "prodigy" and not found.blocking
    assert values(found)["optimizer.options"] == {"d_coef": 2, "betas": [0.9, 0.99], "weight_decay": 0.0}
    assert "there is no such option" in left(found, "optimizer_args.foo")


def test_adafactor_that_chooses_its_rate_is_reported(tmp_path: Path) -> None:
    name, text = trainer_configs.KOHYA
    text = text.replace("--optimizer_type=AdamW ", "--optimizer_type=Adafactor ")
    assert "chooses its rate" in left(imported(tmp_path, (name, text)), "optimizer_args.relative_step")
    fixed = imported(tmp_path, (name, text.replace('"weight_decay=0.1"', "relative_step=False")))
    assert values(fixed)["optimizer.options"]["relative_step"] is False


def test_losses_and_noise_keep_their_values(tmp_path: Path) -> None:
    name, text = trainer_configs.KOHYA
    more = "--loss_type=huber --huber_c=0.2 --ip_noise_gamma=0.1 --multires_noise_iterations=6 --max_timestep=900"
    recipe = values(imported(tmp_path, (name, text.rstrip() + f" {more} --network_dropout=0.1\n")))
    assert recipe["train.loss_type"] == "huber" and recipe["train.huber_c"] == 0.2
    assert recipe["train.ip_noise_gamma"] == 0.1 and recipe["train.multires_noise_iterations"] == 6
    assert recipe["train.max_timestep"] == 900 and recipe["method.neuron_dropout"] == 0.1


def test_half_a_config_blocks_but_gives_a_recipe(tmp_path: Path) -> None:
    preset = '{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "a/b", "epochs": 2}'
    found = imported(tmp_path, ("preset.json", preset))
    assert [entry.effect for entry in found.blocking] == [Effect.BLOCKS]
    assert "set data.instance_data_dir" in found.blocking[0].reason and "SET-THE-FOLDER" in found.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.toml", " \n", "is empty"),
        ("broken.json", '{"training_method": ', "is not JSON"),
        ("list.yaml", "3", "has no settings"),
        ("cut.txt", "accelerate launch train_network.py --output_name='cat", "cannot be read"),
        ("two.txt", "python train_db.py --a=1\npython train_network.py --b=2", "several commands"),
        ("recipe.yaml", "method: {name: native}\noutput_dir: x", "a dreamfleet recipe already"),
        (
            "control.txt",
            "accelerate launch flux_train_network.py --network_dim=4",
            "flux_train_network.py blocks",
        ),
    ],
)
def test_bad_files_are_errors_that_say_why(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        imported(tmp_path, (name, text))
