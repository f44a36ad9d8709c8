"""Tries every fault of the laboratory (`make lab`), and writes results/lab.json and the table of docs/faults.md.

The faults, and what must come of each, are in tests/support/lab/rows.py. Seconds are recorded, not judged. A row that
ends differently is reported, and the exit code is then 1; the other rows are tried nevertheless.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import RESULTS, write_result

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from lab.laboratory import Laboratory, end_on_sigterm, why_not  # noqa: E402
from lab.rows import ROWS, References, Row, try_row  # noqa: E402

PAGE = ROOT / "docs" / "faults.md"
TABLE = re.compile(r"(?<=<!-- table of make lab -->\n).*(?=<!-- end of table -->)", re.DOTALL)


def try_rows(rows: list[Row], *, note: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Try rows one after the other on one laboratory; return a line of results for each, and pass it to ``note``."""
    results = []
    with Laboratory() as lab:
        references = References(lab)
        for row in rows:
            began = time.monotonic()
            try:
                result = try_row(lab, row, references)
            except Exception as error:  # noqa: BLE001 - reported, and the next row is tried
                result = {"fault": row.name, "failed": f"{type(error).__name__}: {error}"[:2000]}
            results.append(result)
            note(result)
            print(f"{time.monotonic() - began:6.1f} s  {json.dumps(result)}", flush=True)
    return results


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, and which rows have none."""
    columns = (
        "fault", "storage", "workers", "goes on by itself", "new worker, s", "first new step, s", "steps repeated",
        "weights",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for row in results:
        if "failed" in row:
            lines.append(f"| {row['fault']} | | | **not as expected** | | | | |")
            continue
        difference = row["difference"]
        weights = "-" if difference is None else "equal" if difference == 0 else f"within {difference:.1e}"
        goes_on = "yes" if row["goes_on"] else f"exit {row['code']}, then `--resume`"
        seconds = ["-" if row[key] is None else row[key] for key in ("restart_s", "new_step_s")]
        workers = row["workers"] if isinstance(row["workers"], int) else " to ".join(map(str, row["workers"]))
        storage = {"s3": "S3", "shared": "shared folder"}[row["storage"]]
        cells = (row["fault"], storage, workers, goes_on, *seconds, row["repeated"], weights)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if missing := [row.name for row in ROWS if row.name not in {result["fault"] for result in results}]:
        lines += ["", f"Without a result so far: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def store(result: dict[str, Any]) -> None:
    """Replace a row's result in results/lab.json, in the order of the rows, and the table of docs/faults.md."""
    path = RESULTS / "lab.json"
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {each["fault"]: each for each in (*stored, result)}
    rows = [found[row.name] for row in ROWS if row.name in found]
    write_result("lab", {"rows": rows}, how="make lab", show=False)
    write_page()


def write_page() -> None:
    """Replace the table of docs/faults.md by that of results/lab.json."""
    results = json.loads((RESULTS / "lab.json").read_text())["rows"]
    PAGE.write_text(TABLE.sub(lambda _: make_table(results) + "\n", PAGE.read_text()))


def main() -> None:
    """Try all rows and store each result, or those whose name contains ``--rows``, stored with ``--store``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="", help="regular expression: try only these rows, and store nothing"
    )
    parser.add_argument("--store", action="store_true", help="store the results of these rows")
    asked = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    end_on_sigterm()
    is_stored = asked.store or not asked.rows
    results = try_rows(
        [row for row in ROWS if re.search(asked.rows, row.name)],
        note=store if is_stored else lambda result: None,
    )
    failed = [row for row in results if "failed" in row]
    print(f"{len(results) - len(failed)} of {len(results)} rows as expected")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
