"""Parses prompts with options in kohya's format, one per line: ``a cat --n blurry --w 512 --d 3 --s 30 --l 7``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.samplers import plain_sampler

SUFFIXES = (".txt",)  # of prompt files


def parse_prompt_line(line: str, defaults: ImageRequest) -> ImageRequest:
    """Parse a prompt with options, which override ``defaults``. Raises UserError naming an invalid option.

    ``--n`` negative prompt, ``--w`` and ``--h`` pixels, ``--d`` seed, ``--s`` steps, ``--l`` guidance scale, ``--ss``
    sampler.
    """
    prompt, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    changes: dict[str, Any] = {}
    for option in options:
        letter, _, value = option.partition(" ")
        if letter not in _OPTIONS:
            raise UserError(f"--{letter} is no option of a prompt; there are --{', --'.join(_OPTIONS)}")
        name, read = _OPTIONS[letter]
        try:
            changes[name] = read(value.strip())
        except (ValueError, UserError) as error:
            raise UserError(f"--{letter} {value.strip() or 'without a value'}: {error}") from None
    return replace(defaults, prompt=prompt.strip(), **changes)


def read_prompts(given: Sequence[str], *, folder: str | None = None, is_file: bool = False) -> list[str]:
    """Return prompts with the names of prompt files replaced by their lines; check the options of all prompts.

    Text that ends with ``.txt``, or with ``is_file`` any text, is a file name, relative to ``folder``. Raises
    RecipeError that lists each file, line and option that is invalid.
    """
    lines, errors = [], []
    for number, text in enumerate(given, start=1):
        named = [(f"prompt {number}", text)]
        if is_file or (text.strip().lower().endswith(SUFFIXES) and "\n" not in text):
            named = _lines_of(text.strip(), folder)
        for where, line in named:
            lines.append(line)
            try:
                parse_prompt_line(line, ImageRequest())
            except UserError as error:
                errors.append(f"{where}: {error}")
    if errors:
        raise RecipeError("\n  ".join(errors))
    return lines


def _lines_of(name: str, folder: str | None) -> list[tuple[str, str]]:
    """Return the (position, text) of each line of a prompt file, except blank lines and comments (``#``)."""
    import os

    from dreamfleet.datasets.storage.storage import read_text

    address = name if "://" in name else os.path.abspath(os.path.join(folder or "", os.path.expanduser(name)))
    try:
        text = read_text(address)
    except UserError as error:
        raise RecipeError(f"the prompts in {name}: {error}") from error
    numbered = enumerate(text.splitlines(), start=1)
    lines = [
        (f"{address}, line {number}", line.strip())
        for number, line in numbered
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise RecipeError(f"{address} contains no prompt: write one per line")
    return lines


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < least:
            raise ValueError(f"give a whole number from {least} on")
        return int(text)

    return read


def _scale(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d*)?|\.\d+", text, re.ASCII):
        raise ValueError("give a number, such as 7.5")
    return float(text)


def _sampler(text: str) -> str:
    kohyas = {"k_euler_a": "euler_a", "dpmsolver++": "dpm++"}
    return plain_sampler(kohyas.get(text, text))


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", _whole(1)),
    "h": ("height", _whole(1)),
    "d": ("seed", _whole(0)),
    "s": ("steps", _whole(1)),
    "l": ("guidance_scale", _scale),
    "ss": ("scheduler", _sampler),
}
