"""A fleet in a notebook."""

from __future__ import annotations

from pathlib import Path

from fleets import BASE, HOSTILE, REAL, SIZE, TUNED, make_failed, make_row, write_samples

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet.notebook import MOST_FAILED, MOST_ROWS, notebook_html
from dreamfleet.tune.fleet.thumbnails import write_thumbnail


def test_a_notebook_shows_failures_first_and_embeds_the_images(tmp_path: Path) -> None:
    fleet = Storage(tmp_path)
    write_samples(fleet.child("subjects/cat 0"), {0: BASE, 100: TUNED}, REAL)
    write_thumbnail(fleet, "cat 0", "subjects/cat 0", resolution=SIZE)
    rows = [make_row(n) for n in range(30)] + [make_failed(40 + n, reason=HOSTILE) for n in range(6)]
    html = notebook_html(rows, str(tmp_path), title=HOSTILE)
    assert "36 subjects" in html and "30 completed" in html and "6 failed" in html
    assert html.count("<tr>") == 1 + MOST_ROWS and html.count("<b>failed</b>") == MOST_FAILED
    assert html.index("cat 40") < html.index("cat 0<")
    assert html.count("data:image/webp;base64,") == 1, "the other thumbnails do not exist"
    assert "CLIP-I" in html and f"{36 - MOST_ROWS} more" in html and str(tmp_path / "index.html") in html
    assert (
        "<script" not in html and "<img src=x" not in html and html.count("&lt;img src=x") == 1 + MOST_FAILED
    )
