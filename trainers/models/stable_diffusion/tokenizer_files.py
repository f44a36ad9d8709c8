"""How long a caption is in tokens, by a model's tokenizer where it is on this disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dreamfleet.trainers.config.model import POCKET
from dreamfleet.trainers.models.pretrained import pocket_folder


def token_counter(model: str) -> tuple[str, Callable[[str], int]]:
    """Return whose tokenizer counts, in words, and a function: text -> its tokens, without start and end.

    A model that is no diffusers folder on this disk is counted by the pocket model's tokenizer, which knows 2000 pieces
    where CLIP's knows 49 408: its figures are upper limits of CLIP's.
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
