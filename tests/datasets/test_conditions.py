"""Test the conditions of `data.where`: precedence, errors with their position, and limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamfleet.datasets.conditions import Node, columns_of, parse_condition


def column(name: str) -> Node:
    return Node("column", (name,))


def test_and_binds_stronger_than_or_and_not_strongest() -> None:
    parsed = parse_condition("a or not b and c")
    assert parsed == Node("or", (column("a"), Node("and", (Node("not", (column("b"),)), column("c")))))


def test_products_bind_stronger_than_sums_and_comparisons_weakest() -> None:
    parsed = parse_condition("a + b * 2 >= -3.5")
    product = Node("multiply", (column("b"), Node("value", (2,))))
    assert parsed == Node("greater_equal", (Node("add", (column("a"), product)), Node("value", (-3.5,))))


@pytest.mark.parametrize(
    ("text", "kind"),
    [("a in (1, 2)", "in"), ("a not in ('x')", "not"), ("a HAS 'cat'", "has"), ("a is not null", "not")],
)
def test_words(text: str, kind: str) -> None:
    assert parse_condition(text).kind == kind
    assert columns_of(parse_condition(text)) == {"a"}


def test_quotes_can_be_escaped() -> None:
    assert parse_condition(r"a = 'it\'s'").operands[1] == Node("value", ("it's",))


@pytest.mark.parametrize(
    "text",
    ["", "a <", "a < 2 b", "(a", "a has 3", "a in ()", "a ; b", "'open", "import os", "a.b()", "a not b"],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="where"):
        parse_condition(text)


def test_deep_and_long_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_condition("(" * 100 + "a" + ")" * 100)
    with pytest.raises(ValueError, match="characters"):
        parse_condition("a < 1 and " * 1000 + "a")


@given(st.text(alphabet="ab01.<>='\" ()andornoti\\-+*/,", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse_condition(text)
    except ValueError:
        pass
