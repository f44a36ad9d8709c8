"""Sends the training state of one worker to the others of its process group, from memory to memory."""

from __future__ import annotations

from dreamfleet.trainers.distributed.roster import Generation
from dreamfleet.trainers.distributed.tensor_tree import broadcast_tree
from dreamfleet.trainers.loop import Progress
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpointing import Checkpointing


def share_state(
    parts: Parts, checkpointing: Checkpointing, progress: Progress, generation: Generation
) -> None:
    """Load the state of the generation's source on every member that has an older one or none; all members call this.

    If the transfer breaks, ``progress.done`` is None: the state is then that of no step.
    """
    engine, method, distributed = parts.engine, parts.method, parts.distributed
    assert generation.source is not None
    before, progress.done = progress.done, None
    holds = distributed.rank == generation.source
    tree = None
    if holds:
        tree = {
            "weights": engine.weights(),
            "engine": engine.state(),
            "steps_before": method.steps_before,
            "start_step": checkpointing.start_step,
            "seconds": checkpointing.clock.lap(),
        }
    tree = broadcast_tree(tree, source=generation.source, distributed=distributed)
    if not holds and (
        before != generation.done or distributed.rank >= len(generation.members) - len(generation.joined)
    ):
        engine.load_weights(tree["weights"])
        engine.load_state(tree["engine"])
        method.steps_before = tree["steps_before"]
        checkpointing.start_step = tree["start_step"]
        checkpointing.clock.adopt(tree["seconds"])
    progress.done = generation.done
