"""Counts the tokens of captions with the tokenizer of a local model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dreamfleet.trainers.config.model import POCKET
from dreamfleet.trainers.models.pretrained import pocket_folder


def token_counter(model: str) -> tuple[str, Callable[[str], int]]:
    """Return a description of the tokenizer, and a function text -> number of tokens without start and end.

    For a model that is not a local diffusers folder, the pocket model's tokenizer is used. Its vocabulary has 2,000
    entries and CLIP's 49,408, so its counts are upper limits for CLIP's.
    """
    from transformers import CLIPTokenizer

    folder = Path(model) / "tokenizer"
    if model != POCKET and folder.is_dir():
        name = f"counted by {model}"
    else:
        folder = pocket_folder() / "tokenizer"
        name = "counted by the pocket model's tokenizer" + (
            "" if model == POCKET else ": CLIP's own counts fewer"
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return name, lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
