"""The page for comparing two trials' images blind: ``compare.html``, which works alone or served by ``compare``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dreamfleet.datasets.errors import DataError, UserError
from dreamfleet.datasets.rng import key, numpy_rng
from dreamfleet.trainers.report.html import environment
from dreamfleet.trainers.report.preview_grid import data_uri, read_real_images
from dreamfleet.tune.sheet import TEMPLATES, trial_previews
from dreamfleet.tune.trial_store import TrialStore
from dreamfleet.tune.votes import CHOICES, EQUAL, Comparison, Vote, append_vote, read_votes

FILE = "compare.html"
MOST_TRIALS = 12  # 66 pairs
MOST_CELLS = 6  # images of one trial
MOST_REAL, REAL_SIDE = 6, 192  # training images above the pair, and their longest side in pixels
LONGEST_SIDE = 512  # longest side in pixels of an image on the page
Cell = tuple[str, int]  # prompt and seed


class BlindPage:
    """The comparisons of the best ``most`` trials of a search; implements the labelling server's ``LocalPage``.

    Raises DataError if fewer than two trials have previews of the same prompt and seed.
    """

    def __init__(self, store: TrialStore, *, most: int = MOST_TRIALS):
        self.folder, self.title = store.folder, store.recipe.run_name
        self.images: dict[str, dict[Cell, Any]] = {}
        for trial in store.ranking():
            if len(self.images) == most:
                break
            if cells := trial_previews(store.folder, trial):
                # One image of each prompt before a second one of any.
                chosen = sorted(cells, key=lambda cell: (cell.column, cell.row))[:MOST_CELLS]
                self.images[trial.name] = {(cell.prompt, cell.seed): cell.image for cell in chosen}
        self.comparisons = plan_comparisons(self.images, seed=store.search.seed)
        if not self.comparisons:
            raise DataError(
                f"{self.folder.path()} has no two trials with previews of the same prompt and seed to compare. Set "
                "validation.prompts, so that trials sample images (validation.num_images each)"
            )
        run = self.folder.child(store.trial(next(iter(self.images))).folder)
        self.real = read_real_images(run, store.recipe.data.resolution)[:MOST_REAL]
        self._known = {comparison.id: comparison for comparison in self.comparisons}

    def html(self, nonce: str = "") -> str:
        """Return the page with the votes so far; with ``nonce`` for the server, else for opening the file."""
        numbers = {
            place: number
            for number, place in enumerate(
                (name, cell) for name, cells in self.images.items() for cell in cells
            )
        }
        data = {
            "images": [data_uri(self.images[name][cell], longest=LONGEST_SIDE) for name, cell in numbers],
            "comparisons": [
                {
                    "id": one.id,
                    "left": one.left,
                    "right": one.right,
                    "prompt": one.prompt,
                    "seed": one.seed,
                    "images": [numbers[side, (one.prompt, one.seed)] for side in (one.left, one.right)],
                }
                for one in self.comparisons
            ],
            "real": [data_uri(image, longest=REAL_SIDE) for image in self.real],
            "votes": {vote.comparison.id: self._choice(vote) for vote in self._votes()},
            "store": "votes-" + format(key("page", self.folder.url), "x"),
            "is_served": bool(nonce),
        }
        page = environment(TEMPLATES).get_template("compare.html")
        return page.render(title=self.title, nonce=nonce, data=data, folder=self.folder.path())

    def answer(self, request: Any) -> dict[str, Any]:
        """Record ``{id, choice}`` and return the number of votes. Raises UserError for another comparison or choice."""
        comparison, choice = self._known.get(request["id"]), request["choice"]
        if comparison is None or choice not in CHOICES:
            raise UserError("this page is from another search, or the search has changed: reload the page")
        append_vote(self.folder, comparison, choice)
        return {"votes": len(self._votes())}

    def find_image(self, name: str) -> tuple[bytes, str] | None:
        """Return None: the page contains its images."""
        return None

    def report(self) -> dict[str, Any]:
        """Return the folder, the number of votes on these comparisons, and the number of comparisons."""
        return {
            "search": self.folder.path(),
            "votes": len(self._votes()),
            "comparisons": len(self.comparisons),
        }

    def _votes(self) -> list[Vote]:
        return [vote for vote in read_votes(self.folder) if vote.comparison.id in self._known]

    def _choice(self, vote: Vote) -> str:
        if vote.winner == EQUAL:
            return EQUAL
        return "left" if vote.winner == self._known[vote.comparison.id].left else "right"


def plan_comparisons(trials: Mapping[str, Mapping[Cell, Any]], *, seed: int) -> list[Comparison]:
    """Return the comparisons of all pairs of trials, in the order in which they are shown.

    Every pair appears once, with one of the images that both trials have, before any pair appears a second time.
    Order and sides are random, keyed by ``seed`` and the names: a longer search inserts its new pairs and changes
    nothing else.
    """
    pairs: list[tuple[int, Comparison, int]] = []
    for a, b in itertools.combinations(sorted(trials), 2):
        rng = numpy_rng("comparison", seed, a, b)
        common: Sequence[Cell] = sorted(trials[a].keys() & trials[b].keys())
        for number, index in enumerate(rng.permutation(len(common))):
            left, right = (a, b) if rng.random() < 0.5 else (b, a)
            pairs.append((number, Comparison(left, right, *common[index]), int(rng.integers(2**62))))
    return [comparison for _, comparison, _ in sorted(pairs, key=lambda pair: (pair[0], pair[2]))]
