"""Writes the generation parameters of an image in the webui's format, as the `parameters` text of a PNG.

Format (webui, `modules/processing.py`, `modules/infotext_utils.py`): the prompt, a line `Negative prompt: ...`, and a
last line of `Key: value` pairs, where a value with a comma, a colon or a line break is a JSON string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL import PngImagePlugin

from dreamfleet.trainers.config.samplers import plain_sampler

KEY = "parameters"  # key of the PNG text chunk
_WEBUI_NAMES = {"ddim": "DDIM", "euler_a": "Euler a", "dpm++": "DPM++ 2M"}
_SCHEDULES = {"dpm++": "Karras"}


def sampler_entries(name: str, *, zero_snr: bool = False) -> dict[str, str | None]:
    """Return the webui's entries for a sampler; ``zero_snr``: the noise schedule has zero terminal SNR."""
    plain = plain_sampler(name)
    # With zero terminal SNR the samplers use evenly spaced steps that start at the last timestep.
    schedule = "SGM Uniform" if zero_snr and plain in _SCHEDULES else _SCHEDULES.get(plain, "Automatic")
    return {
        "Sampler": _WEBUI_NAMES[plain],
        "Schedule type": schedule,
        "Noise Schedule": "Zero Terminal SNR" if zero_snr else None,
        "RNG": "CPU",
    }


def infotext(prompt: str, negative_prompt: str, entries: Mapping[str, Any]) -> str:
    """Return the text of the parameters; entries that are None are left out."""
    pairs = ", ".join(f"{key}: {_quoted(value)}" for key, value in entries.items() if value is not None)
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{pairs}".strip()


def png_info(text: str) -> PngImagePlugin.PngInfo:
    """Return PNG metadata that contains the text under KEY."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, text) if text.isascii() else info.add_itxt(KEY, text)
    return info


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text
