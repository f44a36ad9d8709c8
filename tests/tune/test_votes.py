"""Votes of blind comparisons: their file, and what they say about the trials."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from servers import S3Server, s3_server  # noqa: F401

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.votes import (
    EQUAL,
    FILE,
    Comparison,
    Vote,
    agreement,
    append_vote,
    preferences,
    read_votes,
)

A_B = Comparison("a", "b", "a <x> on the beach", 7)


def test_votes_are_read_back_and_the_last_of_a_comparison_counts(tmp_path: Path) -> None:
    folder = Storage(tmp_path)
    assert read_votes(folder) == []
    append_vote(folder, A_B, "left")
    append_vote(folder, Comparison("a", "b", "a <x> at night", 7), "equal")
    append_vote(folder, Comparison("b", "a", A_B.prompt, 7), "left")  # the same pair with its sides exchanged
    assert [vote.winner for vote in read_votes(folder)] == [EQUAL, "b"]
    assert (tmp_path / FILE).read_text().count("\n") == 3


def test_a_vote_after_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    folder = Storage(tmp_path)
    append_vote(folder, A_B, "left")
    with open(tmp_path / FILE, "a") as file:
        file.write('{"left": "a", "ri')
    assert [vote.winner for vote in read_votes(folder)] == ["a"]
    append_vote(folder, Comparison("a", "c", "p", 0), "right")
    assert [vote.winner for vote in read_votes(folder)] == ["a", "c"]


STRANGER = '{"left": "a", "right": "b", "prompt": "p", "seed": 0, "winner": "c"}'


@pytest.mark.parametrize("line", ["[]", "null", '{"left": "a"}', STRANGER])
def test_lines_that_are_no_votes_are_skipped(line: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(line + "\n")
    assert read_votes(Storage(tmp_path)) == []


def test_preferences_follow_the_votes() -> None:
    order = ["a", "b", "c", "d"]
    votes = [Vote(Comparison(x, y, "p", 0), x) for x, y in itertools.combinations(order, 2)]
    votes.append(Vote(Comparison("c", "d", "q", 0), EQUAL))
    found = preferences(votes)
    assert list(found) == order
    assert (found["a"].votes, found["a"].wins) == (3, 3) and (found["d"].votes, found["d"].wins) == (4, 0.5)
    assert 0.5 < found["b"].chance < found["a"].chance < 1 and 0 < found["d"].chance < found["c"].chance < 0.5


def test_a_chance_counts_the_strength_of_the_opponents() -> None:
    # c and d both won one of two votes: c against the strong a, d against the weak e.
    votes = [Vote(Comparison("a", other, f"p{n}", 0), "a") for n in range(5) for other in ("b", "e")]
    votes += [Vote(Comparison("a", "c", "p", 0), "c"), Vote(Comparison("a", "c", "q", 0), "a")]
    votes += [Vote(Comparison("e", "d", "p", 0), "d"), Vote(Comparison("e", "d", "q", 0), "e")]
    found = preferences(votes)
    assert found["c"].wins == found["d"].wins == 1 and found["c"].chance > found["d"].chance + 0.1
    assert preferences([]) == {}


def test_the_agreement_of_a_score_counts_decided_votes_only() -> None:
    scores = {"a": 1.0, "b": 2.0, "c": 2.0}

    def is_better(x: str, y: str) -> bool | None:
        return None if scores[x] == scores[y] else scores[x] > scores[y]

    votes = [
        Vote(Comparison("a", "b", "p", 0), "b"),  # agrees
        Vote(Comparison("c", "a", "p", 0), "a"),  # disagrees
        Vote(Comparison("c", "a", "q", 0), EQUAL),
        Vote(Comparison("c", "b", "q", 0), "b"),  # equal scores
    ]
    assert agreement(votes, is_better) == (1, 2)


@pytest.mark.s3
def test_votes_of_two_commands_on_one_bucket_are_kept(
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    folder = s3_server.new_folder()
    one, other = Storage(folder), Storage(folder)
    append_vote(one, A_B, "left")
    append_vote(other, Comparison("a", "c", "p", 0), "right")
    append_vote(one, Comparison("b", "c", "p", 0), EQUAL)
    assert [vote.winner for vote in read_votes(other)] == ["a", "c", EQUAL]
