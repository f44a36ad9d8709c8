"""Test infotexts of generated images in the webui's format, sampler names, and use of every artifact kind."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import tiny_model
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.hypernetwork_structure import Structure
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.samplers import plain_sampler
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.aesthetic import write_aesthetic
from dreamfleet.trainers.models.formats.embedding import Embedding, write_embedding
from dreamfleet.trainers.models.formats.hypernetwork import write_hypernetwork
from dreamfleet.trainers.models.sampling.infotext import infotext, png_info, sampler_entries
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Hypernetwork


def parsed(text: str) -> tuple[str, str, dict[str, str]]:
    """Parse an infotext as the webui does; return (prompt, negative prompt, parameters).

    The format is prompt lines, then `Negative prompt:`, then a line of at least three `key: value` pairs.
    """
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    negative_from = next(
        (n for n, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines)
    )
    prompt = "\n".join(lines[:negative_from])
    negative = "\n".join(lines[negative_from:]).removeprefix("Negative prompt:").strip()
    return prompt, negative, {key: json.loads(value) if value[:1] == '"' else value for key, value in pairs}


@pytest.mark.parametrize("value", ["plain", "a, b", "a: b", 'say "x", y', "two\nlines", "ü, é", 7, 7.5, True])
def test_values_round_trip_through_the_webui_parser(value: Any) -> None:
    text = infotext(
        "a cat,\non a mat",
        "bad: hands, (worse:1.2)",
        {"Steps": 20, "Odd key-1": value, "CFG scale": 7.0, "No": None},
    )
    prompt, negative, entries = parsed(text)
    assert (prompt, negative) == ("a cat,\non a mat", "bad: hands, (worse:1.2)")
    assert entries == {"Steps": "20", "Odd key-1": str(value), "CFG scale": "7"}


def test_text_of_any_language_round_trips_through_a_png(tmp_path: Path) -> None:
    for text in ("a cat", "eine Käte, ein 猫"):
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=png_info(text))
        with Image.open(tmp_path / "x.png") as image:
            assert image.info["parameters"] == text


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("DDIM", "ddim"),
        ("Euler a", "euler_a"),
        ("DPM++ 2M Karras", "dpm++"),
        ("DPM++ 2M", "dpm++"),
        ("dpm++", "dpm++"),
    ],
)
def test_webui_sampler_names_are_accepted(name: str, plain: str) -> None:
    assert plain_sampler(name) == plain
    model = tiny_model()
    assert type(model.make_sampler(plain_sampler(name))) is type(model.make_sampler(plain))


def test_an_unknown_sampler_is_an_error() -> None:
    with pytest.raises(UserError, match="'UniPC'"):
        plain_sampler("UniPC")


@pytest.mark.parametrize("name", ["DDIM", "Euler a", "DPM++ 2M Karras"])
def test_samplers_equal_diffusers(name: str) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs: Any = {
        "DDIM": lambda: DDIMScheduler(**noise, steps_offset=1, clip_sample=False),
        "Euler a": lambda: EulerAncestralDiscreteScheduler(**noise, steps_offset=1),
        "DPM++ 2M Karras": lambda: DPMSolverMultistepScheduler(
            **noise, use_karras_sigmas=True, steps_offset=1
        ),
    }[name]()
    ours = tiny_model().make_sampler(plain_sampler(name))
    ends = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(1, 4, 4, 4, generator=generator) * scheduler.init_noise_sigma
        options = {"generator": generator} if name == "Euler a" else {}
        for time in scheduler.timesteps:
            entered = scheduler.scale_model_input(latents, time)
            latents = scheduler.step(0.3 * entered.sin(), time, latents, return_dict=False, **options)[0]
        ends.append(latents)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(*ends)


def test_one_call_takes_every_artifact_and_records_it(tmp_path: Path) -> None:
    model = load_model(ModelConfig())
    width = model.context_width
    for name in ("qzx", "qzx-neg", "vbn"):
        write_embedding(Embedding(name, torch.full((2, width), 0.01)), tmp_path / f"{name}.pt")
    for name in ("ink", "oil"):
        torch.manual_seed(len(name))
        network = Hypernetwork([width], Structure(weight_init="XavierNormal"))
        write_hypernetwork(network.to_file(name), tmp_path / f"{name}.pt")
    write_aesthetic(torch.randn(1, model.text_encoder.config.projection_dim), tmp_path / "taste.pt")
    arguments = [
        "sample",
        "--prompt",
        "a qzx flower <hypernet:oil:0.5>",
        "--negative-prompt",
        "blur: bad, worse",
    ]
    arguments += ["--embedding", str(tmp_path / "qzx.pt"), "--embedding", str(tmp_path / "vbn.pt")]
    arguments += ["--hypernetwork", f"{tmp_path / 'ink.pt'}:0.8", "--aesthetic", str(tmp_path / "taste.pt")]
    arguments += [
        "--aesthetic-steps",
        "1",
        "--scheduler",
        "DPM++ 2M Karras",
        "--steps",
        "2",
        "--num-images",
        "2",
    ]
    arguments += ["--seed", "5", "--clip-skip", "2", "--out", str(tmp_path / "grid.png")]
    for _ in range(2):
        result = CliRunner().invoke(program.app, [*arguments, "--out-dir", str(tmp_path / "single")])
        assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "single").iterdir())
    assert names == ["00000-5.png", "00001-6.png", "00002-5.png", "00003-6.png"]
    texts = {}
    for path in (
        tmp_path / "grid.png",
        tmp_path / "single" / "00000-5.png",
        tmp_path / "single" / "00001-6.png",
    ):
        with Image.open(path) as image:
            texts[path.name] = image.info["parameters"]
            size = image.size
    assert texts["grid.png"] == texts["00000-5.png"]
    prompt, negative, entries = parsed(texts["00001-6.png"])
    assert prompt in (
        "a qzx flower <hypernet:ink:0.8><hypernet:oil:0.5>",
        "a qzx flower <hypernet:oil:0.5><hypernet:ink:0.8>",
    )
    assert negative == "blur: bad, worse, qzx-neg"
    digests = [
        f"{name}: {hashlib.sha256((tmp_path / f'{name}.pt').read_bytes()).hexdigest()[:12]}"
        for name in ("qzx", "qzx-neg")
    ]
    expected = {
        "Steps": "2",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "6",
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": model.short_hash(),
        "Model": "pocket",
        "Clip skip": "2",
        "RNG": "CPU",
        "TI hashes": ", ".join(digests),  # without vbn, which is not in the prompt
        "Aesthetic embedding": "taste",
        "Aesthetic steps": "1",
        "Aesthetic slerp": "False",
    }
    assert {key: entries[key] for key in expected} == expected
    assert entries["Version"].startswith("dreamfleet ")


def test_an_unwritable_output_is_an_error_before_sampling(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, message in (
        (["--out-dir", str(tmp_path / "file")], "file"),
        (["--scheduler", "x"], "does not exist"),
    ):
        arguments = ["sample", "--prompt", "x", "--out", str(tmp_path / "x.png"), *options]
        result = CliRunner().invoke(program.app, arguments)
        assert result.exit_code != 0 and message in result.output.replace("\n", " ") + str(result.exception)
    assert not (tmp_path / "x.png").exists()


def sample_text(tmp_path: Path, *arguments: str) -> tuple[str, str, dict[str, str]]:
    out = tmp_path / "x.png"
    result = CliRunner().invoke(
        program.app, ["sample", "--num-images", "1", "--steps", "1", "--out", str(out), *arguments]
    )
    assert result.exit_code == 0, result.output
    with Image.open(out) as image:
        return parsed(image.info["parameters"])


def test_prompts_are_escaped_for_the_webui(tmp_path: Path) -> None:
    syntax = "a (cat:1.3) AND [dog|b] :0.5"
    assert sample_text(tmp_path, "--prompt", f"{syntax} # mine")[0] == syntax
    prompt, negative, _ = sample_text(
        tmp_path, "--plain-prompts", "--prompt", syntax, "--negative-prompt", "a <lora:x:1> BREAK"
    )
    assert prompt == r"a \(cat:\1.3\) A\ND \[dog\|b\] :\0.5"
    assert negative == r"a <\lora:x:\1> B\REAK"


def test_the_recorded_schedule_is_the_used_one() -> None:
    assert sampler_entries("dpm++")["Schedule type"] == "Karras"
    assert sampler_entries("ddim") == {
        "Sampler": "DDIM",
        "Schedule type": "Automatic",
        "Noise Schedule": None,
        "RNG": "CPU",
    }
    zero = sampler_entries("dpm++", zero_snr=True)
    assert (zero["Schedule type"], zero["Noise Schedule"]) == ("SGM Uniform", "Zero Terminal SNR")


def test_prompt_file_lines_have_their_own_options(tmp_path: Path) -> None:
    path = tmp_path / "asked.txt"
    path.write_text(
        "# cats\n\na cat --n ugly, (bad) --w 96 --h 64 --d 9 --s 2 --l 3.5 --ss euler_a\n a dog\n"
    )
    out = tmp_path / "single"
    sample_text(tmp_path, "--prompts", str(path), "--out-dir", str(out), "--num-images", "2")
    texts = []
    for file in sorted(out.iterdir()):
        with Image.open(file) as image:
            texts.append((*parsed(image.info["parameters"]), image.size))
    assert [text[0] for text in texts] == ["a cat"] * 2 + ["a dog"] * 2
    assert [text[1] for text in texts] == ["ugly, (bad)"] * 2 + [""] * 2
    assert [text[3] for text in texts] == [(96, 64)] * 2 + [(64, 64)] * 2
    assert [text[2]["Seed"] for text in texts] == ["9", "10", "0", "1"]
    entries = texts[0][2]
    assert (entries["Steps"], entries["CFG scale"], entries["Sampler"]) == ("2", "3.5", "Euler a")
    for wrong in (["--prompts", str(tmp_path / "none.txt")], []):
        result = CliRunner().invoke(program.app, ["sample", "--out", str(tmp_path / "x.png"), *wrong])
        assert result.exit_code == 2
