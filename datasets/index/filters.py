"""Chooses the images of a set: `data.where` as a pyarrow expression, a minimum size, and duplicates."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.conditions import Node, columns_of, parse_condition
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.duplicates import first_of_equals, first_of_near

# Returns for each row of a table True (used), or False or a text: why not.
Test = Callable[[pa.Table], Sequence[bool | str]]

PHASH = "phash"  # the column that duplicates: near needs
SEARCHABLE = ("aspect", "pixels", "shorter_side", "tags")  # columns that every index gets for conditions


class Rules(NamedTuple):
    """The filters of one set, in the order in which they apply. A row that fails one is excluded by this rule."""

    conditions: tuple[str, ...] = ()
    min_size: int | None = None
    duplicates: str = "keep"
    near_distance: int = 4

    @property
    def needs_phash(self) -> bool:
        """Whether perceptual hashes must be known."""
        return self.duplicates == "near" or any(
            PHASH in columns_of(parse_condition(text)) for text in self.conditions
        )

    def apply(self, table: pa.Table, *, where: str) -> pa.Array:
        """Return for each row of an index table the rule that excludes it, null if it is used.

        ``where`` names the set in errors. Raises DataError for a condition with an unknown column or an unsuitable
        type.
        """
        excluded: list[str | None] = [None] * table.num_rows
        for rule, test in self._tests(where):
            left = np.flatnonzero([reason is None for reason in excluded])
            kept = test(table.take(pa.array(left)))
            for row, keep in zip(left.tolist(), kept, strict=True):
                if keep is not True:
                    excluded[row] = rule if keep is False else f"{rule}: {keep}"
        return pa.array(excluded, pa.string())

    def _tests(self, where: str) -> list[tuple[str, Test]]:
        conditions = [(f"where: {text}", text) for text in self.conditions]
        if self.min_size is not None:
            conditions.append((f"min_size: {self.min_size}", f"shorter_side >= {self.min_size}"))
        tests: list[tuple[str, Test]] = [
            (rule, partial(evaluate, text=text, where=where)) for rule, text in conditions
        ]
        if self.duplicates != "keep":
            tests.append(("duplicate", first_of_equals))
        if self.duplicates == "near":
            tests.append(("near duplicate", lambda table: first_of_near(table, self.near_distance)))
        return tests


def rules_of(data: DataConfig, where: str | None = None) -> Rules:
    """Return the filters of a `data:` section, and the condition ``where`` of one of its sets."""
    conditions = tuple(text for text in (data.where, where) if text)
    return Rules(conditions, data.min_size, data.duplicates, data.near_distance)


def evaluate(table: pa.Table, *, text: str, where: str) -> list[bool]:
    """Return for each row whether a condition is true; it is not where a column it needs is null."""
    condition = parse_condition(text)
    for name in sorted(columns_of(condition) - set(table.column_names)):
        near = difflib.get_close_matches(name, table.column_names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"data.where {text!r}: {where} has no column {name!r}{hint} (columns: {', '.join(table.column_names)})"
        )
    rows = table.append_column("__row", pa.array(np.arange(table.num_rows)))
    try:
        left = rows.filter(_expression(condition)).column("__row").to_numpy()
    except (pa.ArrowException, TypeError) as error:
        types = ", ".join(f"{name} {table.schema.field(name).type}" for name in sorted(columns_of(condition)))
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.where {text!r}: {reason}. A condition compares values of the same type; {types}"
        ) from error
    kept = np.zeros(table.num_rows, bool)
    kept[left] = True
    return kept.tolist()


def searchable(table: pa.Table) -> pa.Table:
    """Return an index table with the columns that conditions can also name, SEARCHABLE."""
    width, height = (table.column(name).cast(pa.float64()) for name in ("width", "height"))
    more = (
        pc.divide(width, height),
        pc.multiply(table.column("width").cast(pa.int64()), table.column("height").cast(pa.int64())),
        pc.min_element_wise(table.column("width"), table.column("height")),
        table.column("caption"),
    )
    for name, column in zip(SEARCHABLE, more, strict=True):
        if name not in table.column_names:
            table = table.append_column(name, column)
    return table


def _expression(node: Node) -> Any:
    return _MAKERS[node.kind](*node.operands)


def _binary(name: str) -> Callable[[Node, Node], Any]:
    return lambda left, right: getattr(pc, name)(_expression(left), _expression(right))


def _matches(node: Node, pattern: str) -> Any:
    found = pc.match_substring_regex(_expression(node), pattern=pattern, ignore_case=True)
    return pc.coalesce(found, pc.scalar(False))  # an image without a caption has no tags


_MAKERS: dict[str, Callable[..., Any]] = {
    "column": pc.field,
    "value": pc.scalar,
    "and": _binary("and_kleene"),
    "or": _binary("or_kleene"),
    "not": lambda node: pc.invert(_expression(node)),
    "null": lambda node: _expression(node).is_null(),
    "in": lambda node, values: _expression(node).isin(list(values)),
    "has": lambda node, tag: _matches(node, rf"(?:^|[,\n])\s*{re.escape(tag.strip())}\s*(?:[,\n]|$)"),
    "contains": lambda node, text: _matches(node, re.escape(text)),
    "divide": lambda left, right: pc.divide(_expression(left).cast("float64"), _expression(right)),
    **{
        name: _binary(name)
        for name in (
            "equal",
            "not_equal",
            "less",
            "less_equal",
            "greater",
            "greater_equal",
            "add",
            "subtract",
            "multiply",
        )
    },
}
