"""The engine interface: an engine places a method's parameters, computes gradients and steps the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import ENGINES, EngineSpec, engine_name, find_refused
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.distributed.device import copy_to_device
from dreamfleet.trainers.engines.passes import Passes, drive, no_passes
from dreamfleet.trainers.engines.performance import apply_options, release_compiled, start_any_rank
from dreamfleet.trainers.methods.base import Batch, Loss, Method
from dreamfleet.trainers.optim.ema import Ema

T = TypeVar("T")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(EngineSpec, ABC):
    """Trains one method with one optimizer on this worker's device.

    A step has ``num_units`` units, which the workers divide among them (:attr:`units`), and its gradient is the mean
    over the units. So the same global batch gives the same step on any number of workers. All ranks must call each
    method together, except :meth:`to_device`, :meth:`autocast` and :meth:`drop_gradients`. The constructor raises
    RecipeError for settings that the engine does not support.
    """

    def __init__(
        self,
        method: Method,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        mixed_precision: str,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        num_units: int = 1,
        is_elastic: bool = False,
        seed: int = 0,
    ):
        if refused := find_refused({"engine": config}, self.refused(config), by=self.setting(config)):
            raise RecipeError("\n  ".join(refused))
        if reason := method.config.refused_by_engine(config):
            raise RecipeError(reason)
        self.options: Any = self.Options.model_validate(config.options)
        self.seed, self.optimizer_name = seed, optimizer.name
        self.method, self.config, self.device = method, config, device
        self.rank, self.world, self.is_main = rank, world, rank == 0
        self.num_units, self.max_grad_norm = num_units, optimizer.max_grad_norm
        how = config.gradient_exchange
        self.sums_by_unit = is_elastic if how == "auto" else how == "unit"
        self.mixed_precision, self.dtype = mixed_precision, DTYPES[mixed_precision]
        apply_options(method.model, config, device)
        self.groups = [group for group in method.groups() if group.params]
        self.params = {name: param for group in self.groups for name, param in group.params.items()}
        self.ema: Ema | None = None
        self.resources = ExitStack()  # released by close() in reverse order
        self.resources.callback(release_compiled, config)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._build(optimizer)
            undo.pop_all()

    @classmethod
    def place_model(
        cls,
        method: Method,
        config: EngineConfig,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """Move a method and its model to the device, before the engine is built.

        Parts without trainable parameters are cast to ``dtype``; with None they keep their precision.
        """
        move_method(method, device, dtype)

    @abstractmethod
    def _build(self, optimizer: OptimizerConfig) -> None:
        """Create the optimizer and the wrapper of the method (DeepSpeed) at the end of the constructor."""

    @property
    def units(self) -> range:
        """The units of a step that this worker computes: every ``world``-th from its rank."""
        return range(self.rank, self.num_units, self.world)

    #: Whether :meth:`weights` and :meth:`state` return copies in host memory, which training does not change.
    gathers_state = False

    @property
    def regroups(self) -> bool:
        """Whether :meth:`regroup` works: every worker holds the whole state after each step."""
        return False

    @property
    def lockstep(self) -> bool:
        """Whether a forward pass is a collective operation, so that all ranks must run the same forward passes."""
        return False

    def to_device(self, batch: Batch) -> Batch:
        """Return a batch with its tensors copied to the device."""
        return {
            name: copy_to_device(value, self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def autocast(self) -> Any:
        """Return the autocast context for forward passes; it does nothing in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def begin_step(self, rates: dict[str, float], step: int) -> None:
        """Prepare optimizer step ``step`` (from 1), given the learning rate of each group, before its :meth:`backward`.

        ``optimizer.fused_backward`` needs this, because it steps parameters during the backward pass.
        """

    @abstractmethod
    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        """Run the forward and backward pass of one unit and return its detached loss.

        ``last`` is true for this worker's last unit of a step.
        """

    @abstractmethod
    def step(self, rates: dict[str, float], step: int) -> Tensor:
        """Clip the gradients, step the optimizer and update the EMA weights; return the gradient norm.

        ``rates`` holds the learning rate of each group by name; ``step`` counts from 1.
        """

    def effective_rates(self) -> dict[str, float]:
        """Return the learning rate of each group after the last step, if the optimizer changes the recipe's; else {}.

        Prodigy multiplies it by its estimate d.
        """
        return {}

    @abstractmethod
    def drop_gradients(self) -> None:
        """Discard all gradients accumulated since the last step."""

    @abstractmethod
    def evaluate(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank with the averaged weights in the method, and return its result.

        The average is the EMA, or that of a Schedule-Free optimizer; without one the method keeps its own weights. The
        ranks may compute different things, unless :attr:`lockstep`.
        """

    def evaluate_passes(self, passes: Passes[T]) -> Passes[T]:
        """Run a computation as :meth:`evaluate` runs a function; by default its passes are computed here at once.

        An engine on which several trainings can share their passes lets others compute them.
        """
        return no_passes(self.evaluate(lambda: drive(passes)))

    @abstractmethod
    def full_weights(self) -> AbstractContextManager[None]:
        """Within this context rank 0's model holds the averaged weights unsharded and in full precision, for exports.

        The model may be on the CPU and need not be able to run. Without an average it holds its own weights.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights by name on rank 0, unsharded and in full precision (without EMA averaging)."""

    @abstractmethod
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load weights that :meth:`weights` returned. Raises RecipeError if names or shapes differ."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return, on rank 0, what a resume needs besides the weights: optimizer, loss scale, averaged weights.

        Its format does not depend on the engine, so a run can be resumed with another one.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state that :meth:`state` of any engine returned. Raises CheckpointError if it does not fit."""

    def regroup(self, rank: int, world: int) -> None:
        """Continue as ``rank`` of ``world`` workers in the present default process group; drop an unfinished step.

        Called only if the engine's :attr:`regroups` is true. The caller gives all workers equal weights and states.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot change its workers")

    def close(self) -> None:
        """Release hooks, process groups and files. The engine cannot be used afterwards."""
        self.resources.close()

    def any_rank(self, *flags: bool) -> Callable[[], tuple[bool, ...]]:
        """Start a reduction over the ranks' flags; return a function that waits and returns for each if any is true."""
        if self.world == 1:
            return lambda: flags
        return start_any_rank(flags, self.device)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor over the ranks in place, and return it."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def engine_class(config: EngineConfig) -> type[Engine]:
    """Return the class of the engine that an ``engine:`` section selects."""
    return cast(type[Engine], ENGINES.get(engine_name(config)))


def move_method(
    method: Method,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    trained_on: torch.device | None = None,
    sharded: Collection[str] = (),
) -> None:
    """Move a method, its helpers and its model to ``device``; cast parts without trainable parameters to ``dtype``.

    Trainable parameters and the ``method.loss_parts`` named in ``sharded`` are moved to ``trained_on`` instead (None:
    ``device``). Their buffers are always moved to ``device``.
    """
    home = device if trained_on is None else trained_on
    method.model.to(device, dtype, home=home, sharded=sharded)
    for helper in method.helpers.values():
        helper.to(device)
    method.to(home)
    for root in (method, *(method.loss_parts[name] for name in sharded)):
        for module in root.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def check_optimizer(name: str, state: dict[str, Any]) -> None:
    """Raise CheckpointError if the state was saved by another optimizer than ``name``, since its states do not fit."""
    saved = state.get("optimizer_name", name)
    if saved != name:
        raise CheckpointError(
            f"the checkpoint was saved with optimizer.name: {saved}, and this recipe has {name}; set {saved} to resume"
        )
