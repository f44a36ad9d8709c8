"""Describes the webui's optimizer files, which are exported beside embeddings and hypernetworks."""

from __future__ import annotations

from dreamfleet.trainers.artifacts.kind import Usage, Use


def describe_optimizer(name: str) -> Usage | None:
    """Return the usage of ``NAME.pt.optim``; None for another file."""
    if not name.endswith(".optim"):
        return None
    stem = name.removesuffix(".optim")
    text = f"copy beside `{stem}`; with Settings > Training > Saves Optimizer state on, training continues from it"
    return Usage("The optimizer's moments, to continue training in the webui.", (Use("webui", text),))
