"""The Jinja2 environment of the HTML reports, which escapes all values."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.preview_grid import data_uri

TEMPLATES = Path(__file__).with_name("templates")


def environment(*folders: Path) -> Environment:
    """Return an environment that searches templates in ``folders`` and then in this package's folder."""
    found = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": formatting.number,
        "seconds": formatting.seconds,
        "size": formatting.size,
        "data_uri": data_uri,
    }
    return found
