"""Builds the parts of one run from its recipe: model, method, data, batch plan, feed, engine and schedule."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pyarrow as pa
import torch

from dreamfleet.datasets.buckets import number_buckets, training_sizes
from dreamfleet.datasets.index.file_hashes import known_files
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sets import Sets, load_sets
from dreamfleet.datasets.path_field import by_key
from dreamfleet.datasets.plan import BatchPlan
from dreamfleet.datasets.serve.latent_files import LatentCache
from dreamfleet.datasets.shard_order import shard_numbers
from dreamfleet.trainers.batches.build import build_feed
from dreamfleet.trainers.batches.cached_latents import leave_out_bad, open_latents
from dreamfleet.trainers.batches.class_images import gather_class_images
from dreamfleet.trainers.batches.feed import Feed, check_words, to_samples
from dreamfleet.trainers.batches.image_feed import ImageFeed
from dreamfleet.trainers.batches.image_warnings import log_buckets, log_findings
from dreamfleet.trainers.config.conflicts import require_runnable
from dreamfleet.trainers.config.learning_rate import last_step
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.train import USUAL_CHECKPOINTING_STEPS
from dreamfleet.trainers.distributed.agreement import check_files, compare, compare_paths, share_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.shared_table import share_with_table
from dreamfleet.trainers.engines.base import DTYPES, Engine, engine_class
from dreamfleet.trainers.evaluation.previews import check_previews
from dreamfleet.trainers.loop import Schedule
from dreamfleet.trainers.methods.base import Batch, Method, method_class
from dreamfleet.trainers.methods.build import build_method, check_resolution
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod, require_diffusion
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.optim.optimizers import check_package, make_rates
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.disk import require_run_disk
from dreamfleet.trainers.run.vae_encoder import encoding_actors
from dreamfleet.trainers.run.webui_optimizer import take_over

log = logging.getLogger(__name__)

#: Returns the components of a model that a method needs, as :func:`load_model` does.
Load = Callable[[ModelConfig, Collection[str]], DiffusionModel]


@dataclass
class Parts:
    """The parts of one run, on one rank."""

    recipe: Recipe
    distributed: DistributedContext
    sets: Sets
    model: DiffusionModel
    method: Method
    engine: Engine
    feed: Feed | ImageFeed
    prepare: Callable[[Batch], Batch]
    rates: dict[str, Callable[[int], float]]
    schedule: Schedule
    global_batch: int
    held_out: Index | None = None  # images that an image method reserves for evaluation


def make_method(
    recipe: Recipe, sets: Sets | None, device: torch.device, *, load: Load = load_model
) -> Method:
    """Load the base model, build the method on it, and move both to ``device`` as the engine needs."""
    model = load(recipe.model, method_class(recipe.method).needs)
    method = build_method(recipe, model, concepts=sets.concepts if sets else ())
    dtype = DTYPES[recipe.train.mixed_precision] if device.type == "cuda" else None
    engine_class(recipe.engine).place_model(method, recipe.engine, device=device, dtype=dtype)
    return method


def assemble(
    recipe: Recipe,
    distributed: DistributedContext,
    *,
    begins: bool = True,
    keeps_files: bool = True,
    load: Load = load_model,
) -> Parts:
    """Build all parts of a run on this rank; every rank of the run calls it.

    ``begins``: read the file that the recipe starts from, such as ``initial_embedding``; False if a checkpoint is
    loaded next, which contains it. ``keeps_files``: refuse a run whose files do not fit the disk. ``load``
    returns the base model. Raises UserError for faults of the recipe, the images or the model.
    """
    distributed.on_every_rank(lambda: check_machine(recipe, distributed))
    torch.manual_seed(recipe.train.seed)
    sets, method, cache = load_inputs(recipe, distributed, load=load)
    method.require_formats(recipe.train.export_formats or ())
    if keeps_files:
        distributed.on_rank_0(
            lambda: log.info("%s", require_run_disk(recipe, method, images=len(sets.instances)))
        )
    model = method.model
    if isinstance(method, DiffusionMethod):
        warning = method.check_prompts(to_samples(sets.instances), recipe.data)
        if warning and distributed.is_main:
            log.warning("%s", warning)
    moments = distributed.on_every_rank(method.start) if begins else {}
    weights = {name: tensor.clone() for name, tensor in method.state().items()} if moments else {}
    check_resolution(recipe, model)
    if recipe.validation.holdout:
        require_diffusion(method, "validation.holdout")
    if recipe.validation.prompts:
        drawing = require_diffusion(method, "validation.prompts")
        check_previews(drawing, recipe.validation, recipe.data.resolution)
    held_out = None
    if isinstance(method, ImageMethod):
        chosen, held_out = distributed.on_every_rank(lambda: method.split(sets.instances))
        compare({"what the labels say": chosen.content_hash}, distributed)
        sets = replace(sets, instances=chosen)
    sizes = training_sizes(sets.instances.sizes(), recipe.data)
    if distributed.is_main:
        log_findings(sets.instances, sizes, method, recipe.data)
    classes = None
    if isinstance(method, DiffusionMethod) and method.prior is not None:
        classes = gather_class_images(recipe, sets, method, distributed)
    train = recipe.train
    num_units = count_units(recipe, distributed)
    global_batch = num_units * train.train_batch_size
    plan = make_plan(recipe, sets.instances, sizes, global_batch=global_batch, classes=classes)
    if recipe.data.enable_bucket and distributed.is_main:
        log_buckets(sizes, plan.smallest_bucket, global_batch)
    schedule = make_schedule(recipe, plan)
    feed, prepare = build_feed(
        recipe,
        method,
        plan,
        distributed,
        num_units=num_units,
        instances=sets.instances,
        classes=classes,
        cache=cache,
        start_actors=encoding_actors(recipe, method.model.encoder_hash) if cache is not None else None,
    )
    engine = make_engine(recipe, method, distributed)
    with ExitStack() as undo:
        undo.callback(engine.close)
        if moments:
            take_over(engine, moments, weights)
        total = schedule.total
        rates = make_rates(engine.groups, recipe.optimizer, total_steps=total, global_batch=global_batch)
        undo.pop_all()
    return Parts(
        recipe,
        distributed,
        sets,
        model,
        method,
        engine,
        feed,
        prepare,
        rates,
        schedule,
        global_batch,
        held_out,
    )


def load_inputs(
    recipe: Recipe, distributed: DistributedContext, *, load: Load = load_model
) -> tuple[Sets, Method, LatentCache | None]:
    """Load the data, the method with its base model, and the latent cache (None without ``data.cache_dir``).

    Raises StorageError on every rank if a rank reads different files than rank 0.
    """
    compare_paths(by_key(named for named in recipe.paths if named.field.compared), distributed)
    sets = share_sets(recipe, distributed)
    method = distributed.on_every_rank(lambda: make_method(recipe, sets, distributed.device, load=load))
    model, base = method.model, method.base
    compare(
        {f"the base model {base.name}": base.content_hash, "the model's VAE": model.encoder_hash}, distributed
    )
    cache = distributed.on_every_rank(lambda: open_latents(recipe.data, model))
    if cache is not None:
        instances = sets.instances
        kept = share_index(distributed, lambda: leave_out_bad(instances, cache, recipe.data), compares=False)
        sets = replace(sets, instances=kept)
    if isinstance(method, DiffusionMethod) and not isinstance(method, ImageMethod):
        check_words(to_samples(sets.instances), method, recipe.data)  # before class images are generated
    return sets, method, cache


def share_sets(recipe: Recipe, distributed: DistributedContext) -> Sets:
    """Index the data on rank 0 and send the index to every rank.

    Raises StorageError on every rank if a rank reads different files than rank 0.
    """

    def load() -> Sets:
        known = known_files(recipe.data)
        return load_sets(
            recipe.data, verify=False if known else None, known=known, excluded=recipe.excluded_folders
        )

    sets = share_with_table(load, distributed, table_of=_table_of, with_table=_with_table)
    check_files(sets.instances, distributed)
    return sets


def _table_of(sets: Sets) -> pa.Table:
    return sets.instances.table


def _with_table(sets: Sets, table: pa.Table) -> Sets:
    return replace(sets, instances=sets.instances.with_table(table))


def count_units(recipe: Recipe, distributed: DistributedContext) -> int:
    """Return the number of units of ``train.train_batch_size`` images that the workers divide among them at each step.

    It depends on the largest number of workers of the run, not on the number at the moment.
    """
    return max(recipe.scaling.max_workers, distributed.world) * recipe.train.gradient_accumulation_steps


def make_plan(
    recipe: Recipe,
    instances: Index,
    sizes: Sequence[tuple[int, int]],
    *,
    global_batch: int,
    classes: Index | None = None,
) -> BatchPlan:
    """Return the batch plan of a run; ``sizes``: the training size of each instance image in pixels."""
    return BatchPlan(
        instances.numbers("concept"),
        seed=recipe.train.seed,
        global_batch=global_batch,
        repeats=instances.uses(),
        buckets=number_buckets(sizes),
        class_concepts=classes.numbers("concept") if classes is not None else (),
        shards=shard_numbers(instances.lazily(("uri",), str)) if recipe.data.shuffle == "shards" else None,
        shuffle_window=recipe.data.shuffle_window,
    )


def make_engine(recipe: Recipe, method: Method, distributed: DistributedContext) -> Engine:
    """Build the engine that the recipe names."""
    return engine_class(recipe.engine)(
        method,
        config=recipe.engine,
        optimizer=recipe.optimizer,
        mixed_precision=recipe.train.mixed_precision,
        device=distributed.device,
        rank=distributed.rank,
        world=distributed.world,
        num_units=count_units(recipe, distributed),
        is_elastic=recipe.scaling.is_elastic,
        seed=recipe.train.seed,
    )


def make_schedule(recipe: Recipe, plan: BatchPlan) -> Schedule:
    """Return the number of optimizer steps, and the steps at which the run saves, evaluates and logs."""
    train = recipe.train
    total = train.max_train_steps or max(1, plan.steps_in(train.num_train_epochs or 0))
    # As in the webui, a schedule string whose last rate has an end step ends the training at that step.
    end = last_step(recipe.optimizer.learning_rate)
    total = min(total, end or total)
    save_at: frozenset[int] = frozenset()
    if every := train.save_every_n_epochs:
        ends = map(plan.steps_in, itertools.count(every, every))
        save_at = frozenset(itertools.takewhile(lambda step: step <= total, ends))
    return Schedule(
        total=total,
        save_every=total if every else train.checkpointing_steps or USUAL_CHECKPOINTING_STEPS,
        sample_every=recipe.validation.steps,
        log_every=train.log_steps,
        save_at=save_at,
    )


def check_machine(recipe: Recipe, distributed: DistributedContext) -> None:
    """Check, before anything is loaded or generated, that the recipe can run on this machine.

    Raises RecipeError if the length of the training is not set, ResourceError for settings that need a GPU or
    a package that is not installed.
    """
    require_runnable(recipe.train, recipe.optimizer, has_gpu=distributed.device.type == "cuda")
    check_package(recipe.optimizer)
