"""Predicts a recipe's training on a cluster: time of a step with each engine, checkpoints, failures, and their cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamfleet.trainers.memory.plan import MemoryPlan
from dreamfleet.trainers.memory.profile import make_batch, method_without_weights
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.saved_sizes import checkpoint_bytes, measure_weights
from dreamfleet.trainers.scale.cluster import Cluster
from dreamfleet.trainers.scale.communication import (
    Sizes,
    StepTime,
    Traffic,
    exchange_traffic,
    step_time,
    zero_traffic,
)
from dreamfleet.trainers.scale.recovery import Costs, best_interval, effective_share, young_interval

NUMBERS = (8, 16, 32, 64, 128, 256, 512)  # of GPUs, in the table
BUCKET = 50_000_000  # elements of ZeRO's messages


@dataclass(frozen=True)
class Engine:
    """An engine in the prediction: ``regroups`` if the survivors of a failure keep their state."""

    name: str
    traffic: Callable[[Sizes, int], Traffic]
    regroups: bool = False


ENGINES = (
    Engine("torch", exchange_traffic, regroups=True),
    *(Engine(f"ZeRO-{stage}", partial(zero_traffic, stage=stage, bucket=BUCKET)) for stage in (1, 2, 3)),
)


@dataclass(frozen=True)
class Prediction:
    """One engine on one cluster: its step, the checkpoint interval in seconds and steps, and what failures leave.

    ``chosen_interval``: Daly's interval; ``share``: effective training time with it, ``recipe_share`` with the recipe's
    ``checkpointing_steps``. ``wall``: expected seconds of all the recipe's steps, with the recipe's interval.
    """

    engine: str
    gpus: int
    step: StepTime
    young: float
    chosen_interval: float
    chosen_steps: float
    share: float
    recipe_share: float
    wall: float


@dataclass(frozen=True)
class ClusterPlan:
    """The prediction for each engine on the given cluster, and for the first engine on clusters of other sizes."""

    cluster: Cluster
    sizes: Sizes
    costs: Costs
    checkpoint_bytes: int
    steps: int
    recipe_interval: int
    engines: tuple[Prediction, ...]
    growth: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values; times in seconds, infinite ones as null."""
        plain = asdict(self)
        plain["cluster"] |= {"nodes": self.cluster.nodes, "failure_interval": self.cluster.failure_interval}
        for group in ("engines", "growth"):
            for entry, one in zip(plain[group], getattr(self, group), strict=True):
                entry["step"] |= {"seconds": one.step.seconds, "efficiency": one.step.efficiency}
        return _finite(plain)


def plan_cluster(recipe: Recipe, cluster: Cluster, memory: MemoryPlan) -> ClusterPlan:
    """Predict a recipe on a cluster. ``memory``: its memory plan, which has the sizes. Loads no weights."""
    method = method_without_weights(recipe)
    assert isinstance(method, DiffusionMethod)  # else there is no memory plan
    counts, train = memory.counts, recipe.train
    micros = train.gradient_accumulation_steps
    sizes = Sizes(
        trained=counts.total,
        passed=counts.passed,
        width=2 if counts.bf16_weights else 4,
        micros=micros,
        flops=micros * count_flops(recipe, method),
        images=micros * train.train_batch_size,
        by_unit=sums_by_unit(recipe),
    )
    written = checkpoint_bytes(recipe, measure_weights(recipe, method))
    costs = estimate_costs(cluster, state=written, model=counts.model)
    return predict(
        cluster,
        sizes,
        costs,
        checkpoint_bytes=written,
        steps=train.max_train_steps or 0,
        recipe_interval=train.checkpointing_steps or 0,
        zero_width=2 if counts.mixed or counts.bf16_weights else 4,
    )


def predict(
    cluster: Cluster,
    sizes: Sizes,
    costs: Costs,
    *,
    checkpoint_bytes: int,
    steps: int,
    recipe_interval: int,
    zero_width: int = 4,
    numbers: Sequence[int] = NUMBERS,
) -> ClusterPlan:
    """Predict a run of known sizes and costs; ``zero_width``: bytes of an element that ZeRO sends."""

    def one(engine: Engine, cluster: Cluster) -> Prediction:
        sent = sizes if engine.regroups else Sizes(**{**asdict(sizes), "width": zero_width})
        step = step_time(sent, engine.traffic(sent, cluster.gpus), cluster)
        failures = cluster.failure_interval
        # A cluster of one node has no survivors.
        share = partial(effective_share, costs=costs, failure_interval=failures)
        keeps = engine.regroups and cluster.nodes > 1
        interval = best_interval(costs, failures)
        recipe_share = share(recipe_interval * step.seconds or math.inf, regroups=keeps)
        return Prediction(
            engine=engine.name,
            gpus=cluster.gpus,
            step=step,
            young=young_interval(costs.save, failures),
            chosen_interval=interval,
            chosen_steps=interval / step.seconds,
            share=share(interval, regroups=keeps),
            recipe_share=recipe_share,
            wall=steps * step.seconds / recipe_share if recipe_share else math.inf,
        )

    return ClusterPlan(
        cluster,
        sizes,
        costs,
        checkpoint_bytes,
        steps,
        recipe_interval,
        engines=tuple(one(engine, cluster) for engine in ENGINES),
        growth=tuple(one(ENGINES[0], cluster.of(number)) for number in numbers),
    )


def estimate_costs(cluster: Cluster, *, state: int, model: int) -> Costs:
    """Return what saves and failures cost on a cluster, for ``state`` bytes of a checkpoint and ``model`` of the model.

    A save copies the state to the host, and writes it from there. After a failure all nodes read model and state.
    """
    background = state / cluster.storage
    return Costs(
        save=state / cluster.gpu.host,
        background=background,
        restart=cluster.restart + (model + state) / cluster.storage,
        regroup=cluster.regroup + state / cluster.link,
    )


def sums_by_unit(recipe: Recipe) -> bool:
    """Return whether the torch engine would exchange gradients after each micro-batch."""
    how = recipe.engine.gradient_exchange
    return recipe.scaling.is_elastic if how == "auto" else how == "unit"


def count_flops(recipe: Recipe, method: DiffusionMethod) -> int:
    """Return the operations of the forward and backward pass of one micro-batch; ``method``: on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        method(make_batch(recipe, method)).total.backward()
    return counter.get_total_flops()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
