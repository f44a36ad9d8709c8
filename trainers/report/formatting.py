"""Formats numbers for reports and messages: durations, sizes, losses, learning rates."""

from __future__ import annotations

import math


def seconds(value: float) -> str:
    """Format a duration: 0.42 s, 12 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    if not math.isfinite(value):
        return "?"
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: float) -> str:
    """Format a number of bytes: 512 B, 4.2 kB, 23.4 MB, 1.7 GB (powers of 1000)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def number(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits: 1 234, 0.0831, 5e-6, 12.5."""
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    if value < 0:
        return "\N{MINUS SIGN}" + number(-value, digits)
    if value == int(value) and value < 1e15:
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if 1000 <= value < 1e15:
        return number(round(value))
    if value < 1e-3 or value >= 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:.{digits}g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def share(value: float) -> str:
    """Format a fraction as per cent: 0.4 %, 12 %, 100 %."""
    percent = value * 100
    if 0 < percent < 0.05:
        return "< 0.1 %"
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"
