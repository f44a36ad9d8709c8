"""The command `compare`: a person compares the images of a search's trials blind."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dreamfleet.cluster.cli.base import AsJson, Verbose, print_json, work
from dreamfleet.cluster.cli.pages import Browser, Port, serve


def compare(
    folder: Annotated[
        str,
        typer.Argument(metavar="SEARCH", help="The folder of a search, local or s3://.", show_default=False),
    ],
    trials: Annotated[int, typer.Option(help="Compare the best N trials.", min=2, metavar="N")] = 12,
    port: Port = 0,
    browser: Browser = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare the images of a search's trials on a local web page, two at a time and without their names.

    Keys: left and right choose an image, down is a draw, u goes back. Every vote is saved immediately in votes.jsonl in
    the folder of the search; stop with Ctrl-C. The votes then appear beside the scores, in report.html and
    trials.parquet.
    """
    with work():
        from dreamfleet.trainers.run.claim import Held
        from dreamfleet.trainers.run.run_folder import own
        from dreamfleet.tune.blind import BlindPage
        from dreamfleet.tune.open_search import open_folder
        from dreamfleet.tune.report import write_search_report
        from dreamfleet.tune.results import write_table
        from dreamfleet.tune.votes import preferences, read_votes

        store = open_folder(folder)
        page = BlindPage(store, most=trials)
        serve(page, port=port, title="compare the trials", browser=browser)
        try:
            with own(store.folder):
                store = open_folder(folder)  # again: the search may have been continued in the meantime
                write_search_report(store)
                write_table(store)
        except Held as error:  # the search writes both when it ends, with the votes
            print(f"the votes are saved; report and table are not written yet: {error}", file=sys.stderr)
        found = {
            **page.report(),
            "report": store.folder.path("report.html"),
            "trials": [
                {"trial": name, "votes": one.votes, "wins": one.wins, "preferred": one.chance}
                for name, one in preferences(read_votes(store.folder)).items()
            ],
        }
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from dreamfleet.trainers.report import formatting

    print(f"votes      {found['votes']} of {found['comparisons']} comparisons")
    print(f"report     {found['report']}")
    for row in found["trials"]:
        wins = f"{formatting.number(row['wins'])} of {row['votes']} votes"
        print(f"{row['trial']}  {wins}, preferred to an average trial {formatting.share(row['preferred'])}")
