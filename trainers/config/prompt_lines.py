"""Prompts with options, one a line, as kohya's files have them: ``a cat --n blurry --w 512 --d 3 --s 30 --l 7``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.config.samplers import plain_sampler

if TYPE_CHECKING:
    pass

ENDINGS = (".txt",)  # of the files that hold prompts


@dataclass(frozen=True)
class Shot:
    """One picture to draw: its prompt and how. None: the model's own size."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str = "ddim"
    width: int | None = None
    height: int | None = None

    @property
    def together(self) -> tuple[Any, ...]:
        """What pictures must have in common to be drawn in one batch."""
        return self.steps, self.guidance_scale, self.scheduler, self.width, self.height

    def told(self) -> dict[str, Any]:
        """Return how it is drawn, by name, but for its prompt and seed."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("prompt", "seed")}


def shot_of(line: str, usual: Shot) -> Shot:
    """Read a prompt with options; what it does not say is as ``usual``. Raises UserError naming what it cannot read.

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
    return replace(usual, prompt=prompt.strip(), **changes)


def read_prompts(given: Sequence[str], *, folder: str | None = None, is_file: bool = False) -> list[str]:
    """Put the lines of a file in place of its name, and check all lines: prompts with options.

    A text that ends with ``.txt`` names a file, or any that ``is_file``; relative ones start at ``folder``.
    Raises RecipeError naming each file, line and option that cannot be read.
    """
    lines, mistakes = [], []
    for number, text in enumerate(given, start=1):
        named = [(f"prompt {number}", text)]
        if is_file or (text.strip().lower().endswith(ENDINGS) and "\n" not in text):
            named = _lines_of(text.strip(), folder)
        for where, line in named:
            lines.append(line)
            try:
                shot_of(line, Shot(""))
            except UserError as error:
                mistakes.append(f"{where}: {error}")
    if mistakes:
        raise RecipeError("\n  ".join(mistakes))
    return lines


def _lines_of(name: str, folder: str | None) -> list[tuple[str, str]]:
    """Read a file of prompts: each line's name and text, without blank lines and those that begin with ``#``."""
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
        raise RecipeError(f"{address} holds no prompt: write one a line")
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
