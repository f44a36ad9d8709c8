"""The engine for models that exceed a GPU: DeepSpeed ZeRO, stages 0 to 3, with offload to host memory or NVMe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import ZeroSpec
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.distributed.process_group import lone_group, step_timeouts
from dreamfleet.trainers.engines import deepspeed_internals as internals
from dreamfleet.trainers.engines.base import Engine, T, check_optimizer, move_method
from dreamfleet.trainers.engines.zero_nvme import SwapFolder, SwappedShards, build_swapping
from dreamfleet.trainers.engines.zero_setup import (
    destroy_group,
    import_deepspeed,
    make_cpu_adam,
    stdout_to_stderr,
    zero_config,
)
from dreamfleet.trainers.engines.zero_shards import Shards, owners
from dreamfleet.trainers.methods.base import Batch, Loss, Method, check_fits
from dreamfleet.trainers.optim.ema import Ema, saved_average
from dreamfleet.trainers.optim.optimizers import make_optimizer

Convert = Callable[[nn.Parameter, Tensor], Tensor]


class ZeroEngine(ZeroSpec, Engine):
    """Trains a method with DeepSpeed, which shards optimizer states, gradients and weights over the workers.

    Checkpoints hold unsharded tensors by parameter name, like TorchEngine's, instead of DeepSpeed's files per rank. A
    run can therefore be resumed with another number of workers, another stage, or another engine.

    Stage 3 also shards the frozen parts that gradients pass through, so that an embedding or a LoRA can be trained on a
    U-Net that exceeds a GPU's memory. All ranks then run every forward pass together, including those of previews.
    """

    gathers_state = True

    @classmethod
    def place_model(
        cls, method: Method, config: EngineConfig, *, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Move a method to the device, except the parts that DeepSpeed shards, which stay in host memory until then.

        The GPU therefore need not hold the unsharded weights. Stages 1 to 3 shard the trainable parameters, stage 3
        also the frozen parts that gradients pass through.
        """
        waits = device.type == "cuda" and config.zero_stage != 0
        move_method(
            method,
            device,
            dtype,
            trained_on=torch.device("cpu") if waits else device,
            sharded=method.loss_parts if config.zero_stage == 3 else (),
        )

    @property
    def lockstep(self) -> bool:
        return self.stage == 3

    def _build(self, optimizer: OptimizerConfig) -> None:
        assert self.config.zero_stage != "auto"
        if self.num_units % self.world:
            raise RecipeError(
                f"{self.setting(self.config)}: the {self.num_units} micro-batches of a step (the most workers of "
                f"scaling.num_workers x train.gradient_accumulation_steps) cannot be divided among {self.world} "
                "workers, and DeepSpeed's compute equally many. Use a number of workers that divides it, or the engine "
                "torch"
            )
        self.stage: int = self.config.zero_stage
        self.offloads = self.config.offload_optimizer_device != "none"
        self.shapes = {name: param.shape for name, param in self.params.items()}
        self.deepspeed = import_deepspeed(self.device)
        self.resources.enter_context(lone_group(self.device, destroy=destroy_group))
        plain = make_optimizer(self.groups, optimizer)
        self.saved_groups = plain.state_dict()["param_groups"]
        self.optimizer = make_cpu_adam(plain) if self.offloads else plain
        self.folder = self._open_swap_folder()
        # DeepSpeed's 16-bit modes round all weights of the module, and take the float32 weights from the rounded ones.
        rounds = self.stage > 0 and self.dtype != torch.float32
        # Rounding creates new tensors, so the exact weights can be kept without a copy.
        exact = {
            param: param.detach().float().cpu() if rounds else param.detach().float().cpu().clone()
            for param in self.method.parameters()
            if rounds or not param.requires_grad
        }
        sharded = [self.method, *self.method.loss_parts.values()]
        held: Iterable[nn.Module] = owners(sharded) if self.stage == 3 else [self.method]
        model, mine = _Wrapper(held, self.autocast), set(self.method.parameters())
        self.passed = [param for param in model.parameters() if param not in mine]
        config = zero_config(
            self.config,
            mixed_precision=self.mixed_precision,
            max_grad_norm=self.max_grad_norm,
            num_micros=len(self.units),
            num_params=sum(shape.numel() for shape in self.shapes.values()),
            largest=max(param.numel() for param in model.parameters()),
            swap_folder=str(self.folder.path) if self.folder is not None else None,
        )
        # DeepSpeed knows its own optimizers and torch's.
        config["zero_allow_untested_optimizer"] = not optimizer.kind.offloads
        with stdout_to_stderr(), step_timeouts(), internals.flattens_on_host():
            if self.stage == 3:
                self._shard(model, config)
            self.engine, *_ = self.deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.resources.callback(self.engine.destroy)
        for param in self.method.parameters(recurse=False) if self.stage == 3 else ():
            # The text encoder also uses an embedding's vectors outside of the method's own forward pass.
            self.deepspeed.zero.register_external_parameter(model, param)
        kind = SwappedShards if self.config.offload_optimizer_device == "nvme" else Shards
        self.shards = kind(
            self.engine, self.params, self.optimizer, stage=self.stage, moments=optimizer.kind.moments
        )
        if rounds:
            for name, param in self.params.items():
                self.shards.put(name, exact.pop(param))
        self.frozen = exact
        if self.config.use_ema:
            self.ema = Ema(self._flats(), self.config.ema_decay)

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        self.shards.rest()
        # DeepSpeed divides by the number of micro-batches and applies the fp16 loss scale.
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(lambda: self.method(batch))
        self.engine.backward(loss.total)
        return Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras)

    def step(self, rates: dict[str, float], step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        norm = self._unsharded_norm() if self.stage == 0 else None
        self.engine.step()
        if self.ema is not None:
            self.ema.update(self._flats(), step)
        return torch.as_tensor(self.engine.get_global_grad_norm() if norm is None else norm)

    def drop_gradients(self) -> None:
        if self.stage == 0:
            self.engine.zero_grad()
            return
        internals.discard_gradients(
            internals.zero_optimizer(self.engine), stage=self.stage, offloads=self.offloads
        )

    def evaluate(self, action: Callable[[], T]) -> T:
        if self.stage == 3:
            return self._evaluate_together(action)
        if self.ema is None:
            return action()
        with self._unsharded(lambda param, value: value.to(self.device, param.dtype), everywhere=True):
            return action()

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        with self._unsharded(
            lambda param, value: value.cpu()
        ):  # the GPU may not have enough memory for all weights
            yield

    def weights(self) -> dict[str, Tensor]:
        return self._collect()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        check_fits(self.method.name, self.shapes, weights)
        for name in self.params:
            self.shards.put(name, weights[name])
        self.shards.publish()

    def state(self) -> dict[str, Any]:
        moments: dict[int, dict[str, Any]] = {}
        if steps := self.shards.steps:  # there are no moments before the first step
            moments = {number: {"step": torch.tensor(steps)} for number in range(len(self.params))}
            for moment in self.shards.moments:
                with self.shards.showing(moment):
                    for number, value in enumerate(self._collect().values()):
                        moments[number][moment] = value
        state: dict[str, Any] = {"optimizer": {"state": moments, "param_groups": self.saved_groups}}
        state["optimizer_name"] = self.optimizer_name
        if self.ema is not None:
            with self._averages():
                state["ema"] = self._collect()
        if self.dtype == torch.float16:
            state["scaler"] = self._scaler_state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        check_optimizer(self.optimizer_name, state)
        saved = state["optimizer"]
        if [group["params"] for group in saved["param_groups"]] != [g["params"] for g in self.saved_groups]:
            raise CheckpointError("the saved optimizer does not fit this recipe's: it has other parameters")
        if saved["state"]:
            self._load_moments(saved["state"])
        if self.ema is not None:
            average = saved_average(state)
            with self._averages():
                for name in self.params:
                    self.shards.put(name, average[name])
        if self.dtype == torch.float16 and "scaler" in state:
            self._load_scaler(state["scaler"])

    def _open_swap_folder(self) -> SwapFolder | None:
        if "nvme" not in (self.config.offload_optimizer_device, self.config.offload_param_device):
            return None
        build_swapping()
        folder = SwapFolder(self.config.nvme_path or "")
        self.resources.callback(folder.close)
        return folder

    def _shard(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Cast and shard the weights one at a time, so that the GPU need not hold all of them."""
        for param in model.parameters():
            param.data = param.data.to(self.dtype)
        device = self.config.offload_param_device
        self.deepspeed.zero.Init(
            module=model,
            config_dict_or_path=config,
            dtype=self.dtype,
            remote_device=None if device == "none" else device,
            pin_memory=device != "none" and self.config.pin_memory is not False,
        )

    def _evaluate_together(self, action: Callable[[], T]) -> T:
        """Run ``action`` on all ranks inside a DeepSpeed forward pass, whose hooks gather the weights of each layer."""
        results: list[T] = []
        with self._averages():
            if self.ema is not None:
                self.shards.publish()
            self.engine(lambda: results.append(action()))
        if self.ema is not None:
            self.shards.publish()
        return results[0]

    def _averages(self) -> AbstractContextManager[None]:
        """Within this context the shards hold the EMA weights (without EMA: the weights)."""
        return nullcontext() if self.ema is None else self.shards.holding(list(self.ema.shadow.values()))

    def _flats(self) -> dict[str, Tensor]:
        return {str(number): flat for number, flat in enumerate(self.shards.flats)}

    def _collect(self) -> dict[str, Tensor]:
        """Gather the parameters one at a time into host memory on rank 0; return {} on other ranks."""
        gathered = ((name, self.shards.gather(name)) for name in self.params)
        return {name: value.cpu() for name, value in gathered if self.is_main}

    @contextmanager
    def _unsharded(self, convert: Convert, *, everywhere: bool = False) -> Iterator[None]:
        """Within this context the parameters are unsharded tensors from ``convert``, on rank 0 or ``everywhere``."""
        whole: dict[nn.Parameter, Tensor] = {}
        with self._averages():
            for name, param in self.params.items():
                value = self.shards.gather(name)
                if self.is_main or everywhere:
                    whole[param] = convert(param, value)
        for param in self.passed:
            with self.deepspeed.zero.GatheredParameters([param]):
                if self.is_main or everywhere:
                    whole[param] = convert(param, param.data.clone())
        if self.is_main or everywhere:
            whole |= {param: convert(param, value) for param, value in self.frozen.items()}
        kept = {param: param.data for param in whole}
        try:
            for param, value in whole.items():
                param.data = value
            yield
        finally:
            for param, value in kept.items():
                param.data = value

    def _load_moments(self, saved: dict[int, dict[str, Any]]) -> None:
        steps = float(saved[0]["step"])
        self.shards.make_moments(
            lambda flat: int(steps) if self.offloads else torch.tensor(steps, device=flat.device)
        )
        for moment in self.shards.moments:
            with self.shards.showing(moment):
                for number, name in enumerate(self.params):
                    self.shards.put(name, saved[number][moment])

    def _unsharded_norm(self) -> Tensor:
        # DeepSpeed's stage 0 clips the gradients but does not return the norm.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
        scaler = internals.grad_scaler(self.engine)
        return (
            norm / scaler._get_scale_async() if scaler is not None else norm
        )  # get_scale() would wait for the GPU

    def _scaler_state(self) -> dict[str, Any]:
        if self.stage == 0:
            state: dict[str, Any] = internals.grad_scaler(self.engine).state_dict()
            return state
        fresh = torch.amp.GradScaler(self.device.type).state_dict()
        scale, since, window = internals.read_loss_scale(internals.zero_optimizer(self.engine))
        # torch resets its counter when the scale grows; DeepSpeed does not, and increases the scale one step later.
        counted = {"_growth_tracker": since % window, "since_overflow": since}
        return {**fresh, **counted, "scale": scale}

    def _load_scaler(self, saved: dict[str, Any]) -> None:
        if self.stage == 0:
            internals.grad_scaler(self.engine).load_state_dict(saved)
        else:
            internals.write_loss_scale(
                internals.zero_optimizer(self.engine),
                saved["scale"],
                since_overflow=saved.get("since_overflow", saved["_growth_tracker"]),
            )


class _Wrapper(nn.Module):
    """The root module passed to DeepSpeed. It enters autocast itself, because DeepSpeed disables an outer autocast."""

    def __init__(self, modules: Iterable[nn.Module], autocast: Callable[[], Any]):
        super().__init__()
        self.held, self.autocast = nn.ModuleList(modules), autocast

    def forward(self, action: Callable[[], Any]) -> Any:
        """Return the result of ``action()``, run under autocast."""
        with self.autocast():
            return action()
