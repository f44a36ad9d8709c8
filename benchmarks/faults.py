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
from pathlib import Path
from typing import Any

from measure import RESULTS, write_result

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from lab.laboratory import Laboratory, end_on_sigterm, why_not  # noqa: E402
from lab.rows import ROWS, References, Row, try_row  # noqa: E402

PAGE = ROOT / "docs" / "faults.md"
TABLE = re.compile(r"(?<=<!-- table of make lab -->\n).*(?=<!-- end of table -->)", re.DOTALL)


def try_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """Try rows one after the other on one laboratory; return a line of results for each."""
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
            print(f"{time.monotonic() - began:6.1f} s  {json.dumps(result)}", flush=True)
    return results


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| fault | workers | goes on by itself | new worker, s | first new step, s | steps repeated | weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        if "failed" in row:
            lines.append(f"| {row['fault']} | | **not as expected** | | | | |")
            continue
        weights = "equal" if row["difference"] == 0 else f"within {row['difference']:.1e}"
        goes_on = "yes" if row["goes_on"] else f"exit {row['code']}, then `--resume`"
        seconds = ["-" if row[key] is None else row[key] for key in ("restart_s", "new_step_s")]
        cells = (row["fault"], row["workers"], goes_on, *seconds, row["repeated"], weights)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """Replace the table of docs/faults.md by that of results/lab.json."""
    results = json.loads((RESULTS / "lab.json").read_text())["rows"]
    PAGE.write_text(TABLE.sub(lambda _: make_table(results), PAGE.read_text()))


def main() -> None:
    """Try all rows, or those whose name contains ``--rows``; only all of them replace the stored results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="", help="regular expression: try only these rows, and store nothing"
    )
    asked = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    end_on_sigterm()
    results = try_rows([row for row in ROWS if re.search(asked.rows, row.name)])
    if not asked.rows:
        write_result("lab", {"rows": results}, how="make lab")
        write_page()
    failed = [row for row in results if "failed" in row]
    print(f"{len(results) - len(failed)} of {len(results)} rows as expected")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
