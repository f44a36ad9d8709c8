"""The command line; `python -m dreamfleet.cluster.cli` is the same as `dreamfleet`."""

from dreamfleet.cluster.cli.program import app, main

__all__ = ["app", "main"]
