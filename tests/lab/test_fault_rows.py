"""Faults on machines made of namespaces: the rows for every change end as the table says (`make lab`: all rows)."""

from collections.abc import Iterator

import pytest
from lab.laboratory import Laboratory, why_not
from lab.rows import ROWS, References, Row, try_row

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    with Laboratory() as lab:
        yield References(lab)


@pytest.mark.parametrize("row", [row for row in ROWS if row.in_ci], ids=lambda row: row.name)
def test_a_run_survives(row: Row, references: References) -> None:
    print(try_row(references.lab, row, references))


def test_the_rows_have_names_of_their_own() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and 4 <= sum(row.in_ci for row in ROWS) <= 6
