"""The page of `dreamfleet data browse`: answers the requests of its script."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreamfleet.cluster.browse import filters
from dreamfleet.cluster.browse.changes import History, make_changes
from dreamfleet.cluster.browse.image_table import ImageTable, require_rows
from dreamfleet.cluster.browse.render import Content, Renderer
from dreamfleet.cluster.browse.write_back import write_back
from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.recipe import Recipe

MOST_ROWS = 500  # images of one page
MAX_REQUEST_BYTES = 32 * 2**20  # a painted mask
FILES = ("browse.css", "browse.js", "editor.js")


class BrowsePage:
    """Shows, filters and edits the images of a recipe's sets; every edit is stored before it is confirmed.

    ``load`` indexes the sets. ``modes``: further pages of the same server, as name -> title.
    """

    def __init__(
        self, recipe: Recipe, load: Callable[[], ImageTable], *, title: str, modes: Mapping[str, str]
    ):
        self.recipe, self.title, self.modes = recipe, title, dict(modes)
        self._load, self._lock = load, threading.RLock()
        self._open()

    def _open(self) -> None:
        self.table = self._load()
        self.history, self.renderer = History(self.table), Renderer(self.table)
        self._selected: tuple[dict[str, Any] | None, Any] = (None, ())
        self._version, self._steps_version = 0, -1
        self._steps: Any = None

    def html(self, nonce: str) -> str:
        """Return the page."""
        folder = Path(__file__).parent
        page = (folder / "browse.html").read_text("utf-8")
        for name in FILES:
            page = page.replace(f"/*{name}*/", (folder / name).read_text("utf-8"))
        return page.replace("NONCE", nonce)

    def answer(self, request: Any) -> dict[str, Any]:
        """Carry out a request of the page's script: ``{"action": ..., ...}``. Raises UserError."""
        actions: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "open": self._describe,
            "page": self._page,
            "facets": self._facets,
            "errors": self._errors,
            "image": self._image,
            "edit": self._edit,
            "undo": lambda _: self._moved(self.history.undo()),
            "redo": lambda _: self._moved(self.history.redo()),
            "step": self._step,
            "write": self._write,
        }
        if request["action"] not in actions:
            raise UserError(f"no such action: {request['action']!r}")
        with self._lock:
            return actions[request["action"]](request)

    def find_image(self, name: str) -> Content | None:
        """Return the image that a path names: ``thumb|whole|fit|weights|mask/ROW/VERSION``, ``step/STEP/NUMBER/V``."""
        kind, *numbers = name.split("/")
        if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in numbers):
            return None
        values = [int(part) for part in numbers]
        if kind in ("step", "step-weights") and len(values) == 3:
            return self._step_image(kind, values[0], values[1])
        draw = {
            "thumb": self.renderer.thumbnail,
            "whole": self.renderer.whole,
            "fit": self.renderer.fitted,
            "weights": self.renderer.weights,
            "mask": self.renderer.mask,
        }.get(kind)
        if draw is None or len(values) != 2 or values[0] >= len(self.table):
            return None
        return draw(values[0])

    def report(self) -> dict[str, Any]:
        """Return the number of images and of edits, and where the edits are stored."""
        stored = [one.folder.url for one in self.table.edit_tables if one.folder is not None and one.edits]
        return {"images": len(self.table), "edited": len(self.table.edits), "edits": stored}

    def _describe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        data = self.table.data
        return {
            "title": self.title,
            "modes": self.modes,
            "images": len(self.table),
            "uses_masks": data.alpha_mask,
            "uses_edits": data.use_edits,
            "can_edit": all(one.folder is not None for one in self.table.edit_tables),
            "random_crop": not data.center_crop,
            **self._counts(),
        }

    def _counts(self) -> dict[str, Any]:
        return {
            "can_undo": bool(self.history.done),
            "can_redo": bool(self.history.undone),
            "edited": len(self.table.edits),
            "version": self._version,
        }

    def _rows(self, wanted: Mapping[str, Any], *, again: bool = False) -> Any:
        """Return the rows of a filter. They stay until another filter or a new search, so that rows do not jump."""
        if again or self._selected[0] != wanted:
            self._selected = (dict(wanted), filters.select_rows(self.table, wanted))
        return self._selected[1]

    def _page(self, request: Mapping[str, Any]) -> dict[str, Any]:
        rows = self._rows(request["filter"], again=bool(request.get("again")))
        start, count = int(request["start"]), min(int(request["count"]), MOST_ROWS)
        start = max(0, min(start, max(0, len(rows) - 1)))
        shown = [self._view(int(row)) for row in rows[start : start + count]]
        return {"total": len(rows), "start": start, "rows": shown, **self._counts()}

    def _facets(self, request: Mapping[str, Any]) -> dict[str, Any]:
        number, tags = filters.count_tags(self.table, str(request.get("find", "")))
        return {
            "tags": tags,
            "number": number,
            "buckets": filters.count_buckets(self.table),
            "states": filters.count_states(self.table),
        }

    def _errors(self, request: Mapping[str, Any]) -> dict[str, Any]:
        start = int(request["start"])
        shown = self.table.bad[start : start + MOST_ROWS]
        return {"total": len(self.table.bad), "start": start, "errors": [list(bad) for bad in shown]}

    def _image(self, request: Mapping[str, Any]) -> dict[str, Any]:
        (row,) = require_rows(self.table, [request["row"]])
        edit = self.table.edit_of(row)
        width, height = self.table.original_size(row)
        return {
            **self._view(row),
            "file": [width, height],
            "uri": self.table.uri(row),
            "crop": edit.crop,
            "focus": edit.focus,
            "box": edit.box(self.table.data),
            "own_mask": edit.mask,
            "original": self.table.original_caption(row),
            "prompt": self._concept_prompt(row),
        }

    def _concept_prompt(self, row: int) -> str | None:
        from dreamfleet.datasets.index.concepts import load_concepts

        return load_concepts(self.table.data)[self.table.concepts[row]].instance_prompt

    def _view(self, row: int) -> dict[str, Any]:
        table = self.table
        width, height = table.size(row)
        return {
            "row": row,
            "name": table.label(row),
            "caption": table.captions[row],
            "size": [width, height],
            "pixels": [int(table.widths[row]), int(table.heights[row])],
            "excluded": bool(table.excluded[row]),
            "edited": row in table.edits,
            "masked": bool(table.masked[row]),
            "copies": int(table.copies[row]),
        }

    def _edit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if "filter" in request:
            left_out = set(request.get("without", ()))
            rows = [int(row) for row in self._rows(request["filter"]) if int(row) not in left_out]
        else:
            rows = require_rows(self.table, request["rows"])
        return self._moved(self.history.apply(make_changes(self.table, rows, request["do"])))

    def _moved(self, rows: list[int]) -> dict[str, Any]:
        self._version += bool(rows)
        shown = [self._view(row) for row in rows[:MOST_ROWS]]
        return {"changed": len(rows), "rows": shown, **self._counts()}

    def _step(self, request: Mapping[str, Any]) -> dict[str, Any]:
        number = request["number"]
        if type(number) is not int or not 1 <= number < 10**9:
            raise UserError(f"no such step: {number!r}")
        return {**self._training().describe(number), "version": self._version}

    def _training(self) -> Any:
        """Return the training's steps with the current edits; importing the trainer takes seconds, so only here."""
        if self._steps_version != self._version:
            from dreamfleet.cluster.browse.training_steps import TrainingSteps

            self._steps = None
            self._steps = TrainingSteps(self.recipe, self.table)
            self._steps_version = self._version
        return self._steps

    def _step_image(self, kind: str, step: int, number: int) -> Content | None:
        with self._lock:
            images = self._training().step(step) if step else []
        if number >= len(images):
            return None
        return images[number].image if kind == "step" else images[number].weights

    def _write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        written = write_back(self.table)
        version = self._version + 1
        self._open()
        self._version = version
        return {"written": written._asdict(), **self._counts()}
