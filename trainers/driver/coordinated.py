"""Serves the coordinator of a run's workers in the process that starts the run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from dreamfleet.trainers.config.engines import engine_name
from dreamfleet.trainers.distributed.coordinator import Coordinator
from dreamfleet.trainers.distributed.roster import Roster
from dreamfleet.trainers.driver.session import RaySession
from dreamfleet.trainers.recipe import Recipe

MemberKey = tuple[tuple[str, int], bytes]  # address and key of a coordinator


@contextmanager
def coordinated(recipe: Recipe, session: RaySession) -> Iterator[MemberKey | None]:
    """Yield the address and key of a coordinator of the run's workers; None if its engine cannot change them."""
    if engine_name(recipe.engine) != "torch" and not recipe.engine.is_auto:
        yield None
        return
    key = secrets.token_bytes(32)
    roster = Roster(recipe.scaling.max_workers, least=recipe.scaling.min_workers)
    with Coordinator(roster, key=key, host=session.own_address) as coordinator:
        yield coordinator.address, key
