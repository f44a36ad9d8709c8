"""The rows of a fleet in the order of its table, read from a file, so that finished subjects take no memory."""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.tune.fleet.columns import PROMPT
from dreamfleet.tune.fleet.progress import COMPLETED, FAILED, INTERRUPTED, STATES, WAITING, States
from dreamfleet.tune.fleet.rows import SubjectImages, SubjectRow
from dreamfleet.tune.fleet.subjects import Subject, Subjects


class FleetRows(Sequence[SubjectRow]):
    """One row per subject; each access builds a new row from the subject, its state and its last record."""

    def __init__(self, subjects: Subjects, states: States):
        self.subjects, self.states = subjects, states
        self._file = tempfile.TemporaryFile(prefix="dreamfleet-fleet-")  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._file.close)
        self._places = array("q", [-1]) * len(subjects)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        state = self.states[index]
        is_over = state in (COMPLETED, FAILED, INTERRUPTED)
        return make_row(self.subjects[index], state, self._record(index) if is_over else {})

    def put(self, index: int, record: Mapping[str, Any]) -> None:
        """Store the record of a subject that ended."""
        with self._lock:
            self._places[index] = self._file.seek(0, 2)
            self._file.write(json_text(record).encode() + b"\n")

    def _record(self, index: int) -> dict[str, Any]:
        with self._lock:
            if self._places[index] < 0:
                return {}
            self._file.seek(self._places[index])
            return json.loads(self._file.readline())


def make_row(subject: Subject, state: int, record: Mapping[str, Any]) -> SubjectRow:
    """Return the row of a subject; ``record``: its line in the record of the fleet, {} if it has none."""
    images = record.get("images")
    run_folder = f"subjects/{subject.name}"
    return SubjectRow(
        name=subject.name,
        status=STATES[state],
        row=subject.row,
        prompt=str(subject.values.get(PROMPT, "")),
        priority=subject.priority,
        values={key: value for key, value in subject.values.items() if key != PROMPT},
        reason=record.get("error"),
        steps=record.get("steps", 0),
        seconds=record.get("seconds", 0.0),
        scores=record.get("scores", {}),
        artifacts=[f"{run_folder}/exports/{name}" for name in record.get("exports", ())],
        run_folder=None if state == WAITING else run_folder,
        report=f"{run_folder}/report.html" if state == COMPLETED else None,
        images=SubjectImages(**images) if images else None,
    )
