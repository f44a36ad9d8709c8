"""Test how captions are composed of the texts of models: templates, blocklists, existing captions."""

from __future__ import annotations

from typing import Any

import pytest

from dreamfleet.cluster.cli.base import pace_text
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.tools.captions import Composition, fill, read_blocklist, without

TEXTS = {"blip": "a red cat on a sofa", "wd": "cat, red fur, sofa"}


@pytest.mark.parametrize(
    ("how", "before", "caption"),
    [
        ({}, None, "a red cat on a sofa, cat, red fur, sofa"),
        ({"template": "sks. {blip}. {wd}"}, "old", "sks. a red cat on a sofa. cat, red fur, sofa"),
        ({"template": "{caption}, {wd}"}, None, "cat, red fur, sofa"),
        ({"existing": "append"}, "old", "old, a red cat on a sofa, cat, red fur, sofa"),
        ({"existing": "prepend"}, "old", "a red cat on a sofa, cat, red fur, sofa, old"),
        ({"existing": "append", "columns": ("wd",)}, "sofa, night", "sofa, night, cat, red fur"),
        ({"existing": "replace", "columns": ("wd",)}, "old", "cat, red fur, sofa"),
    ],
)
def test_captions_are_composed(how: dict[str, Any], before: str | None, caption: str) -> None:
    made = Composition(**{"columns": ("blip", "wd"), "tags": frozenset({"wd"}), **how})
    assert made.caption(TEXTS, before) == caption


def test_blocklists_remove_tags_and_phrases() -> None:
    how = Composition(("blip", "wd"), frozenset({"wd"}), block=("red*", "There is"))
    assert how.cleaned("wd", TEXTS["wd"]) == "cat, sofa"
    assert how.cleaned("blip", "there is a reddish cat, red") == "a cat"
    assert without("araffe cat with an arafed look", ["araf*"]) == "cat with an look"
    assert without("a cat, that is (red), sits", ["that is"]) == "a cat, (red), sits"
    assert without("scattered", ["cat"]) == "scattered"
    assert read_blocklist("red hair\n\n# a comment\nthere is  # BLIP\n") == ("red hair", "there is")


def test_empty_fields_leave_no_commas() -> None:
    texts = {"a": "", "b": "x", "c": ""}
    assert fill("{a}, {b}, {c}", texts) == "x" and fill("{a}{c}", texts) == ""
    assert fill("{b} , {a}, {b}", texts) == "x, x"


@pytest.mark.parametrize("template", ["{blip.__class__}", "{0}", "{", "{blip!r}", "{blip:>9}", "{}"])
def test_templates_have_plain_names_only(template: str) -> None:
    with pytest.raises(DataError, match="template"):
        Composition(("blip",), template=template)


def test_wrong_names_are_errors() -> None:
    for columns in (("caption",), ("url",), ("a b",), ("a", "a")):
        with pytest.raises(DataError):
            Composition(columns)
    with pytest.raises(DataError, match="no column 'other'"):
        Composition(("blip",), template="{other}").caption(TEXTS, None)


def test_progress_tells_rate_and_time_left() -> None:
    assert pace_text(0, 10, 5) == ""
    assert pace_text(600, 6000, 10) == ", 60.0 per second, 2 min left"
    assert pace_text(5, 5000, 20) == ", 4.0 s each, 5.6 h left"
    assert pace_text(100, 0, 10) == ", 10.0 per second"
