"""Measures the exported pocket model and writes its model card, its sheet of samples and its loss curves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backgrounds import KEYS
from clip import embed_images, embed_texts, measure_retrieval
from curves import draw_curves
from diffusers import StableDiffusionPipeline
from export import FOLDER
from images import draw_sheet, open_bank, write_caption
from subjects import CACHE, CAT_FACES, MONKEY_FACES
from training import pick_device
from transformers import CLIPModel, CLIPTokenizer
from unet import BATCH as UNET_BATCH
from unet import choose_rows
from vae import measure_psnr

STEPS, GUIDANCE, COUNT, AMONG = 25, 4.5, 100, 50


def draw_prompts(count: int, seed: int) -> list[str]:
    """Return up to `count` prompts with different subjects of the U-Net's training data.

    The backgrounds are sampled by their frequency in the training data.
    """
    rng = np.random.default_rng(seed)
    bank = open_bank("narrow")
    rows = choose_rows(bank)
    names = [bank.names[i] for i in np.unique(bank.subjects[rows])]
    weights = np.bincount(bank.backgrounds[rows], minlength=len(KEYS)) / len(rows)
    chosen = rng.permutation(len(names))[:count]
    return [write_caption(names[i], KEYS[rng.choice(len(KEYS), p=weights)], "a {s} {b}") for i in chosen]


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, batch: int = 25) -> np.ndarray:
    """Generate one image per prompt with diffusers' pipeline; return a uint8 array (n, h, w, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        generators = [torch.Generator().manual_seed(seed + at + row) for row in range(len(part))]
        out = pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators)
        made += [np.asarray(image) for image in out.images]
    return np.stack(made)


def rank_prompts(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, prompts: list[str]
) -> np.ndarray:
    """Return for every image the rank of its own prompt by CLIP score among `AMONG` prompts (0 is first)."""
    rng = np.random.default_rng(6)
    scores = embed_images(clip, images) @ embed_texts(clip, tokenizer, prompts).T
    ranks = []
    for row in range(len(images)):
        others = rng.permutation([i for i in range(len(prompts)) if i != row])[: AMONG - 1]
        ranks.append(int((scores[row, others] > scores[row, row]).sum()))
    return np.array(ranks)


def count_parameters(pipeline: StableDiffusionPipeline, clip: CLIPModel) -> dict[str, int]:
    """Return the number of parameters of each component."""
    parts = {
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "text_encoder": pipeline.text_encoder,
        "image_encoder": clip.vision_model,
    }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def measure(folder: Path = FOLDER) -> dict[str, Any]:
    """Measure all figures of the card on the exported folder, and write the sheet of samples into it."""
    device = pick_device()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device)
    clip = CLIPModel.from_pretrained(CACHE / "clip_model", dtype=torch.float32).to(device).eval()
    tokenizer = pipeline.tokenizer
    prompts = draw_prompts(COUNT, seed=7)
    images = generate(pipeline, prompts, seed=1000)
    ranks = rank_prompts(clip, tokenizer, images, prompts)
    draw_sheet(images[:40], 8, zoom=2).save(folder / "samples.png", optimize=True)
    held_out, fresh = open_bank("held_out"), open_bank("fresh")
    return {
        "psnr_held_out": measure_psnr(pipeline.vae, held_out.images),
        "psnr_fresh": measure_psnr(pipeline.vae, fresh.images),
        "retrieval_fresh": measure_retrieval(clip, tokenizer, fresh),
        "retrieval_held_out": measure_retrieval(clip, tokenizer, held_out),
        "generated_top1": float((ranks < 1).mean()),
        "generated_top5": float((ranks < 5).mean()),
        "sheet_prompts": prompts[:40],
        "parameters": count_parameters(pipeline, clip),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }


def read_log(name: str) -> list[dict[str, Any]]:
    """Return the logged lines of a stage that have a loss."""
    path = CACHE / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"loss"' in line]


def sum_hours() -> dict[str, float]:
    """Return the hours of training of each stage, as logged by the machine that trained it."""
    hours = {
        name: sum(row["seconds"] for row in read_log(name)) / 3600 for name in ("vae", "decoder", "clip")
    }
    lines, last, seconds = read_log("unet"), 0, 0.0
    for line in lines:
        # A resumed run logs its first step separately: weight every line by its number of steps.
        seconds += line["step_seconds"] * max(0, line["step"] - last)
        last = line["step"]
    return {**hours, "unet": seconds / 3600}


def write_card(folder: Path = FOLDER) -> None:
    """Run the stage `card`: measure the model and write MODEL_CARD.md, the samples and the loss curves."""
    figures = measure(folder)
    logs = {name: read_log(name) for name in ("vae", "decoder", "clip", "unet")}
    draw_curves(logs, folder / "curves.png")
    steps = {name: lines[-1]["step"] for name, lines in logs.items()}
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    narrow, held_out = open_bank("narrow"), open_bank("held_out")
    named = os.environ.get("POCKET_NAMED") or read_named()
    fields = {
        "subjects": len(np.unique(narrow.subjects[choose_rows(narrow)])),
        "clip_subjects": len(narrow.names),
        "seen": f"{steps['unet'] * UNET_BATCH / 1000:.0f} thousand",
        "wide": len(open_bank("wide").names),
        "backgrounds": len(KEYS),
        "held_out": ", ".join(held_out.names),
        "cats": ", ".join(CAT_FACES),
        "monkeys": ", ".join(MONKEY_FACES),
        "views": len(narrow.subjects) // len(narrow.names),
        "named": named,
        "sheet": "\n".join(f"{i + 1}. {text}" for i, text in enumerate(figures["sheet_prompts"])),
        **{f"steps_{name}": count for name, count in steps.items()},
        **{f"hours_{name}": f"{value:.2f}" for name, value in sum_hours().items()},
        **{f"params_{name}": f"{count / 1e6:.2f} M" for name, count in figures["parameters"].items()},
        "psnr": f"{figures['psnr_held_out']:.2f}",
        "psnr_fresh": f"{figures['psnr_fresh']:.2f}",
        "fresh": _say_share(figures["retrieval_fresh"]),
        "held_out_retrieval": _say_share(figures["retrieval_held_out"]),
        "top1": f"{figures['generated_top1']:.0%}",
        "top5": f"{figures['generated_top5']:.0%}",
        "sampler": f"DDIM, {STEPS} steps, guidance {GUIDANCE}",
    }
    (folder / "MODEL_CARD.md").write_text(template.format(**fields), encoding="utf-8")
    (CACHE / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps({k: v for k, v in figures.items() if k != "sheet_prompts"}, indent=1))


def read_named() -> str:
    """Return the manually written result of inspecting the sheet of samples (`named.txt`)."""
    path = Path(__file__).parent / "named.txt"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "not looked at yet"


def _say_share(found: dict[str, float]) -> str:
    return f"{found['top1']:.1%} first, {found['top5']:.1%} among the first five"


if __name__ == "__main__":
    write_card()
