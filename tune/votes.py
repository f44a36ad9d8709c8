"""Votes of blind comparisons, in ``votes.jsonl`` beside the trials' scores, and what they say about the trials."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.rng import key
from dreamfleet.datasets.storage.storage import Storage

FILE = "votes.jsonl"
EQUAL = "equal"
CHOICES = ("left", "right", EQUAL)
ITERATIONS = 200  # of the Bradley-Terry fit, far more than a dozen trials need


@dataclass(frozen=True)
class Comparison:
    """One image of each of two trials, of the same prompt and seed, and the side on which each is shown."""

    left: str
    right: str
    prompt: str
    seed: int

    @property
    def id(self) -> str:
        """The same for both ways round, so that a comparison is not repeated with its sides exchanged."""
        return f"{key('comparison', *sorted((self.left, self.right)), self.prompt, self.seed):016x}"


@dataclass(frozen=True)
class Vote:
    """The answer to a comparison: the name of the preferred trial, or ``"equal"``."""

    comparison: Comparison
    winner: str


@dataclass(frozen=True)
class Preference:
    """The votes on one trial: their number, the wins (an equal pair is half a win), and the fitted chance to win.

    ``chance`` is the probability in [0, 1] that this trial is preferred to an average one (Bradley and Terry, 1952).
    """

    votes: int
    wins: float
    chance: float


def read_votes(folder: Storage) -> list[Vote]:
    """Return the votes in the folder of a search, the last one of each comparison; torn lines are skipped."""
    votes: dict[str, Vote] = {}
    for line in folder.read_text(FILE).splitlines() if folder.exists(FILE) else []:
        try:
            row = json.loads(line)
            found = Comparison(str(row["left"]), str(row["right"]), str(row["prompt"]), int(row["seed"]))
            winner = str(row["winner"])
        except (ValueError, TypeError, KeyError):
            continue
        if winner in (found.left, found.right, EQUAL):
            votes.pop(found.id, None)
            votes[found.id] = Vote(found, winner)
    return list(votes.values())


def append_vote(folder: Storage, comparison: Comparison, choice: str) -> Vote:
    """Append the choice ``left``, ``right`` or ``equal`` to the votes of a search and return the vote."""
    winner = {"left": comparison.left, "right": comparison.right, EQUAL: EQUAL}[choice]
    row = {
        **dataclasses.asdict(comparison),
        "winner": winner,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    while True:
        before, version = folder.read_version(FILE)
        # A kill may have left an incomplete last line, which must not swallow this one.
        line = b"\n" * (bool(before) and not before.endswith(b"\n")) + json_text(row).encode() + b"\n"
        if folder.is_local:
            folder.append_text(FILE, line.decode())
        # A bucket cannot append: if another person votes at the same moment, read and write again.
        elif not folder.write_if(FILE, before + line, version=version):
            continue
        return Vote(comparison, winner)


def preferences(votes: Sequence[Vote]) -> dict[str, Preference]:
    """Return what the votes say about each trial that was voted on, from the most to the least preferred."""
    played: dict[str, dict[str, int]] = {}
    wins: dict[str, float] = {}
    for vote in votes:
        left, right = vote.comparison.left, vote.comparison.right
        for one, other in ((left, right), (right, left)):
            opponents = played.setdefault(one, {})
            opponents[other] = opponents.get(other, 0) + 1
            wins[one] = wins.get(one, 0.0) + (0.5 if vote.winner == EQUAL else float(vote.winner == one))
    strength = _fit(played, wins)
    found = {
        name: Preference(sum(played[name].values()), wins[name], value / (1 + value))
        for name, value in strength.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].chance))


def agreement(votes: Iterable[Vote], is_better: Callable[[str, str], bool | None]) -> tuple[int, int]:
    """Return how many decided votes agree with a score, and their number.

    ``is_better(a, b)`` says whether trial a has the better score than trial b; None if it is equal or unknown.
    """
    verdicts = []
    for vote in votes:
        left, right = vote.comparison.left, vote.comparison.right
        if vote.winner != EQUAL and (verdict := is_better(left, right)) is not None:
            verdicts.append(verdict == (vote.winner == left))
    return sum(verdicts), len(verdicts)


def _fit(played: dict[str, dict[str, int]], wins: dict[str, float]) -> dict[str, float]:
    # The minorisation-maximisation steps of Hunter (2004). One virtual draw of each trial against a player of
    # strength 1 keeps strengths finite if a trial has won or lost every time, and connects trials that never met.
    strength = dict.fromkeys(played, 1.0)
    for _ in range(ITERATIONS):
        strength = {
            one: (wins[one] + 0.5)
            / (1 / (own + 1) + sum(count / (own + strength[other]) for other, count in played[one].items()))
            for one, own in strength.items()
        }
    return strength
