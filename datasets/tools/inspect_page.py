"""Writes a survey of an image set as one HTML file, which needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dreamfleet.datasets.tools.inspect import Survey

SHOWN = 40  # lines of a table or list that are not folded away


def render_survey(survey: Survey, facts: Sequence[tuple[str, str]], *, title: str) -> str:
    """Return the page: warnings, ``facts`` (name and text), sizes, tags, duplicates, and files that are not used."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(
        "survey.html"
    )
    skipped = [f"{item['place']}: {item['reason']}, {item['files']} files" for item in survey.skipped]
    shared = [f"{file}: {', '.join(images)}" for file, images in survey.shared.items()]
    lists = [
        ("Unusable", [f"{file}: {reason}" for file, reason in survey.bad.items()]),
        ("Duplicates", [" = ".join(group) for group in survey.copies]),
        ("Near duplicates", [" = ".join(group) for group in survey.near]),
        ("Without a caption or prompt", survey.wordless),
        ("Extreme shapes", [f"{file}: {text}" for file, text in survey.extreme.items()]),
        ("One caption for several images", shared),
        ("Skipped", skipped + [f"{count} other files: {ending}" for ending, count in survey.others.items()]),
    ]
    return template.render(
        title=title,
        survey=survey,
        facts=facts,
        bars=[("Training sizes", survey.shown_at), ("Tags", survey.tags)],
        lists=lists,
        shown=SHOWN,
    )
