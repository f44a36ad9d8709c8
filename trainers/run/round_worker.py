"""Computes validation rounds from a run's checkpoints, in a process that does not train."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from dreamfleet.datasets.errors import CheckpointError
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sets import Sets
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.passes import drive
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.optim.ema import saved_average
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.build import check_machine, load_inputs, make_engine
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.evaluation import Evaluation
from dreamfleet.trainers.run.rounds import RoundResult

#: keys of ``engine:`` that affect how a forward pass is computed
COMPUTES = ("allow_tf32", "cudnn_benchmark", "channels_last", "torch_compile", "dynamo_backend")
POLL_SECONDS = 0.5  # between two looks for a checkpoint that is being written
LONGEST_WAIT = 3600.0  # seconds for a checkpoint to become complete


@dataclass
class _Parts:
    """The parts of a run that an evaluation uses."""

    recipe: Recipe
    distributed: DistributedContext
    sets: Sets
    method: Method
    engine: Engine
    held_out: Index | None


class RoundWorker:
    """Computes the rounds of one run with the weights of its checkpoints, on one device.

    The method is built as the training builds it, without an optimizer state and with the engine torch, so the figures
    are those that the workers would compute with that engine on the same kind of device. ``begins``: False if the
    training continues from a checkpoint. Raises UserError for faults of the recipe, the images or the model.
    """

    def __init__(self, recipe: Recipe, *, device: torch.device | str = "cpu", begins: bool = True):
        self.averages = recipe.keeps_average
        self.checkpoints = Checkpoints(Storage(recipe.output_dir))
        distributed = DistributedContext(device=torch.device(device))
        recipe = evaluation_recipe(recipe)
        check_machine(recipe, distributed)
        torch.manual_seed(recipe.train.seed)
        sets, method, _ = load_inputs(recipe, distributed)
        if begins:
            method.start()
        held_out = None
        if isinstance(method, ImageMethod):
            chosen, held_out = method.split(sets.instances)
            sets = replace(sets, instances=chosen)
        engine = make_engine(recipe, method, distributed)
        self.evaluation = Evaluation(_Parts(recipe, distributed, sets, method, engine, held_out))
        drive(self.evaluation.begin())
        self.engine = engine

    def __call__(self, step: int) -> RoundResult:
        """Compute the round of ``step``, with the EMA weights if the run has them; of step 0 without a checkpoint.

        Waits until the checkpoint is complete. Raises CheckpointError if that takes an hour, or if it is damaged.
        """
        began = time.monotonic()
        if step > 0:
            self._load(step)
            began = time.monotonic()
        figures = drive(self.evaluation.measure())
        previews = self.evaluation.draw(step)
        return RoundResult(step, figures, previews, seconds=time.monotonic() - began)

    def _load(self, step: int) -> None:
        began = time.monotonic()
        while step not in self.checkpoints.steps():
            if time.monotonic() - began > LONGEST_WAIT:
                raise CheckpointError(f"the checkpoint of step {step} was not complete after an hour")
            time.sleep(POLL_SECONDS)
        found = self.checkpoints.load(step)
        self.engine.load_weights(saved_average(found.engine) if self.averages else found.learned)


def evaluation_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the engine torch, one process, and an optimizer that needs no GPU: nothing is trained."""
    engine = EngineConfig.model_validate({key: getattr(recipe.engine, key) for key in COMPUTES})
    optimizer = recipe.optimizer.model_copy(update={"name": "adamw", "options": {}, "fused_backward": False})
    scaling = recipe.scaling.model_copy(update={"num_workers": 0})
    return recipe.model_copy(update={"engine": engine, "optimizer": optimizer, "scaling": scaling})
