"""Trains the pocket model's CLIP: a text and a vision tower that distinguish subjects and backgrounds.

Half of the batches are grids of subjects and backgrounds, where every image shares its subject with seven
others and its background with fifteen, so a match requires both the subject and the background of the
caption.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from backgrounds import KEYS
from images import TEMPLATES, Bank, open_bank, write_caption
from subjects import CACHE
from training import load_average, pick_device, train_stage
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from vae import to_input

STEPS = 1250
RATE = 1e-3
GRID = (16, 8)  # subjects x backgrounds
BATCH = GRID[0] * GRID[1]
WIDTH = 160
PROJECTION = 128
# Measured on the composed images; the exported image processor has the same values.
MEAN, STD = (0.64, 0.57, 0.54), (0.3, 0.25, 0.28)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build a CLIP with text and vision towers of 4 and 5 layers; special token ids are the tokenizer's."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 5}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        max_position_embeddings=77,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(
        image_size=64, patch_size=8, num_hidden_layers=5, projection_dim=PROJECTION, **shared
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))
    # Fused attention has a slow backward pass on CPUs.
    model.set_attn_implementation("eager")
    return model


def to_pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert uint8 images (n, h, w, 3) to the vision tower's normalised float input (n, 3, h, w)."""
    batch = (to_input(images, device) + 1) / 2
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (batch - mean) / std


class Drawer:
    """Samples batches of images and captions; a caption may omit the subject or the background."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.banks = {"narrow": open_bank("narrow"), "wide": open_bank("wide")}
        self.tokenizer = tokenizer
        bank = self.banks["narrow"]
        self.cells: dict[tuple[int, int], list[int]] = {}
        for index, cell in enumerate(zip(bank.subjects.tolist(), bank.backgrounds.tolist(), strict=True)):
            self.cells.setdefault(cell, []).append(index)
        weights = np.array([weight for _, weight in TEMPLATES])
        self.weights = weights / weights.sum()

    def pick(self, rng: np.random.Generator) -> list[tuple[Bank, int, int, int]]:
        """Sample (bank, image, subject, background) for each item of a batch.

        Subjects of the wide bank are numbered after those of the narrow one.
        """
        narrow, wide = self.banks["narrow"], self.banks["wide"]
        if rng.random() < 0.5:
            subjects = rng.choice(len(narrow.names), GRID[0], replace=False)
            keys = rng.choice(len(KEYS), GRID[1], replace=False)
            cells = [(int(s), int(k)) for s in subjects for k in keys if (int(s), int(k)) in self.cells]
            return [(narrow, int(rng.choice(self.cells[cell])), *cell) for cell in cells]
        n = BATCH * 7 // 10
        items = []
        for bank, base, indices in (
            (narrow, 0, rng.integers(len(narrow.subjects), size=n)),
            (wide, len(narrow.names), rng.integers(len(wide.subjects), size=BATCH - n)),
        ):
            items += [(bank, int(i), base + int(bank.subjects[i]), int(bank.backgrounds[i])) for i in indices]
        return items

    def word(self, bank: Bank, index: int, rng: np.random.Generator) -> tuple[str, bool, bool]:
        """Sample a caption; return it, whether it names the subject, and whether it names the background."""
        key = KEYS[bank.backgrounds[index]]
        if rng.random() < 0.05:
            return write_caption("picture", key, "a {s} {b}"), False, True
        template = TEMPLATES[rng.choice(len(TEMPLATES), p=self.weights)][0]
        return write_caption(bank.names[bank.subjects[index]], key, template), True, "{b}" in template

    def draw(self, step: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the batch of a step; `match[i, j]` tells whether caption i describes image j."""
        rng = np.random.default_rng([12, step])
        items = self.pick(rng)
        texts = [self.word(bank, index, rng) for bank, index, _, _ in items]
        images = np.stack([bank.images[index] for bank, index, _, _ in items])
        dx, dy = rng.integers(-4, 5, 2)
        images = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
        images = images[:, 4 + dy : 68 + dy, 4 + dx : 68 + dx]
        tokens = self.tokenizer([text for text, _, _ in texts], padding=True, return_tensors="pt")[
            "input_ids"
        ]
        # Captions are short, so the later position embeddings would stay untrained: shift the positions in a
        # tenth of the batches.
        places = torch.arange(tokens.shape[1])
        if rng.random() < 0.1:
            places[1:] += int(rng.integers(0, 77 - tokens.shape[1]))
        subjects = torch.tensor([s for _, _, s, _ in items])
        keys = torch.tensor([k for _, _, _, k in items])
        says_subject = torch.tensor([s for _, s, _ in texts])[:, None]
        says_key = torch.tensor([k for _, _, k in texts])[:, None]
        same_subject, same_key = subjects[:, None] == subjects[None], keys[:, None] == keys[None]
        match = (same_subject | ~says_subject) & (same_key | ~says_key)
        batch = {"input_ids": tokens, "position_ids": places[None], "match": match}
        return {**{k: v.to(device) for k, v in batch.items()}, "pixel_values": to_pixels(images, device)}


def contrast(logits: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Return the symmetric cross-entropy of logits (captions, images) with several correct images per caption."""
    wanted = match.float()
    rows = -(wanted / wanted.sum(1, keepdim=True) * F.log_softmax(logits, 1)).sum(1).mean()
    columns = -(wanted / wanted.sum(0, keepdim=True) * F.log_softmax(logits, 0)).sum(0).mean()
    return (rows + columns) / 2


def train_clip() -> CLIPModel:
    """Run the stage `clip`: train both towers together and save them."""
    folder = CACHE / "clip_model"
    if (folder / "config.json").exists():
        return CLIPModel.from_pretrained(folder, dtype=torch.float32)
    device = pick_device()
    tokenizer = CLIPTokenizer.from_pretrained(CACHE / "folder" / "tokenizer")
    torch.manual_seed(2)
    drawer = Drawer(tokenizer)

    def compute(model: torch.nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = drawer.draw(step, device)
        match = batch.pop("match")
        with torch.autocast(device.type, torch.bfloat16):
            out = model(**batch)
        scale = model.logit_scale.clamp(max=4.6).exp()
        texts, images = out.text_embeds.float(), out.image_embeds.float()
        logits = scale * texts @ images.T
        right = match.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return contrast(logits, match), {"top1": right.item(), "scale": scale.item()}

    model = train_stage("clip", build_clip(tokenizer).to(device), compute, STEPS, RATE)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return the unit vectors (n, `PROJECTION`) of texts, padded to 77 tokens as in a pipeline."""
    device = next(model.parameters()).device
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"].to(
        device
    )
    pooled = model.text_model(input_ids=tokens).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


@torch.no_grad()
def embed_images(model: CLIPModel, images: np.ndarray) -> torch.Tensor:
    """Return the unit vectors (n, `PROJECTION`) of uint8 images (n, h, w, 3)."""
    device = next(model.parameters()).device
    pooled = model.vision_model(pixel_values=to_pixels(images, device)).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def measure_retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, bank: Bank, rounds: int = 12
) -> dict[str, float]:
    """Return the share of images whose own caption ranks first, and in the top five, among 50 captions."""
    rng = np.random.default_rng(5)
    hits = np.zeros(2)
    for _ in range(rounds):
        chosen: dict[str, int] = {}
        for index in rng.permutation(len(bank.subjects)):
            name, key = bank.names[bank.subjects[index]], KEYS[bank.backgrounds[index]]
            chosen.setdefault(write_caption(name, key, "a {s} {b}"), int(index))
            if len(chosen) == 50:
                break
        texts = embed_texts(model, tokenizer, list(chosen))
        scores = embed_images(model, np.stack([bank.images[i] for i in chosen.values()])) @ texts.T
        ranks = (scores > scores.diagonal()[:, None]).sum(1)
        hits += [(ranks < 1).float().mean().item(), (ranks < 5).float().mean().item()]
    return {"top1": float(hits[0]) / rounds, "top5": float(hits[1]) / rounds}


def peek_clip() -> CLIPModel:
    """Return CLIP with the averaged weights of the latest saved state."""
    return load_average("clip", build_clip(CLIPTokenizer.from_pretrained(CACHE / "folder" / "tokenizer")))
