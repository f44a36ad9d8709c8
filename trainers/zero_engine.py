"""The engine for models that do not fit: DeepSpeed ZeRO, stages 0 to 3, with offload to host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamfleet.datasets.errors import CheckpointError
from dreamfleet.trainers.average import Ema, saved_average
from dreamfleet.trainers.engine import Engine, check_optimizer
from dreamfleet.trainers.methods.base import Batch, Loss, Method
from dreamfleet.trainers.methods.fits import check_fits
from dreamfleet.trainers.optim import OptimizerConfig, make_optimizer
from dreamfleet.trainers.zero_setup import (
    import_deepspeed,
    join_group,
    make_cpu_adam,
    stdout_to_stderr,
    zero_config,
)
from dreamfleet.trainers.zero_shards import Shards

MOMENTS = ("exp_avg", "exp_avg_sq")
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


class ZeroEngine(Engine):
    """Runs a method under DeepSpeed, which shards optimizer states, gradients and weights over the workers.

    What is saved is whole and by parameter name, in TorchEngine's form, not DeepSpeed's files of each rank: so a run
    goes on with another number of workers, another stage, or the other engine.
    """

    def _build(self, optimizer: OptimizerConfig) -> None:
        assert self.config.zero_stage != "auto"
        self.stage: int = self.config.zero_stage
        self.offloads = self.config.offload_optimizer_device != "none"
        self.shapes = {name: param.shape for name, param in self.params.items()}
        self.deepspeed = import_deepspeed(self.device)
        self.owns_group = join_group(self.device)
        self.leads = dist.get_rank() == 0
        plain = make_optimizer(self.groups, optimizer, self.device)
        self.saved_groups = plain.state_dict()["param_groups"]
        self.optimizer = make_cpu_adam(plain) if self.offloads else plain
        # DeepSpeed's 16-bit modes round every weight of the module before they make fp32 ones from it.
        rounds = self.stage > 0 and self.dtype != torch.float32
        # A rounded weight is a new tensor, so the exact one need not be copied to be kept.
        exact = {
            param: param.detach().float().cpu() if rounds else param.detach().float().cpu().clone()
            for param in self.method.parameters()
            if rounds or not param.requires_grad
        }
        config = zero_config(
            self.config,
            mixed_precision=PRECISIONS[self.dtype],
            max_grad_norm=self.max_grad_norm,
            num_micros=self.num_micros,
            num_params=sum(shape.numel() for shape in self.shapes.values()),
        )
        model = _InAutocast(self.method, self.autocast)
        with stdout_to_stderr():
            if self.stage == 3:
                self._shard(model, config)
            self.engine, *_ = self.deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.shards = Shards(self.engine, self.params, stage=self.stage)
        if rounds:
            for name, param in self.params.items():
                self.shards.put(name, exact.pop(param))
        self.frozen = exact
        if self.config.use_ema:
            self.ema = Ema(self._flats(), self.config.ema_decay)

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        # DeepSpeed divides by the number of micro-batches, and scales for fp16.
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(batch)
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
        # As DeepSpeed discards a step that overflowed; its count of micro-batches decides whether the next is added.
        inner = self.engine.optimizer
        inner.zero_grad()
        if self.stage < 3:
            inner.micro_step_id = -1
            for gradients in (inner.averaged_gradients, inner.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))
        if self.offloads:
            inner.reset_cpu_buffers()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self.ema is None and self.stage < 3:
            yield
            return
        with self._lent(lambda param, value: value.to(self.device, param.dtype)):
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self._lent(
            lambda param, value: value.cpu()
        ):  # a card with room for half of the weights is the usual case
            yield

    def learned(self) -> dict[str, Tensor]:
        return self._collect()

    def load_learned(self, learned: dict[str, Tensor]) -> None:
        check_fits(self.method.name, self.shapes, learned)
        for name in self.params:
            self.shards.put_everywhere(name, learned[name])

    def state(self) -> dict[str, Any]:
        moments: dict[int, dict[str, Any]] = {}
        if first := self.optimizer.state.get(self.shards.flats[0]):  # empty before the first step
            moments = {
                number: {"step": torch.tensor(float(first["step"]))} for number in range(len(self.params))
            }
            for moment in MOMENTS:
                with self.shards.holding([self.optimizer.state[flat][moment] for flat in self.shards.flats]):
                    for number, value in enumerate(self._collect().values()):
                        moments[number][moment] = value
        state: dict[str, Any] = {"optimizer": {"state": moments, "param_groups": self.saved_groups}}
        state["optimizer_name"] = self.optimizer_name
        if self.ema is not None:
            with self.shards.holding(list(self.ema.shadow.values())):
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
            with self.shards.holding(list(self.ema.shadow.values())):
                for name in self.params:
                    self.shards.put(name, average[name])
        if self.dtype == torch.float16 and "scaler" in state:
            self._load_scaler(state["scaler"])

    def close(self) -> None:
        self.engine.destroy()
        if self.owns_group:
            self.deepspeed.comm.destroy_process_group()

    def _shard(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Shard the weights one by one, each as wide as it computes: a card without room for all of them will do."""
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

    def _flats(self) -> dict[str, Tensor]:
        return {str(number): flat for number, flat in enumerate(self.shards.flats)}

    def _collect(self) -> dict[str, Tensor]:
        """Gather one parameter after the other into rank 0's host memory; the others keep nothing."""
        whole = {}
        for name in self.params:
            value = self.shards.gather(name)
            if self.leads:
                whole[name] = value.cpu()
        return whole

    @contextmanager
    def _lent(self, convert: Callable[[nn.Parameter, Tensor], Tensor]) -> Iterator[None]:
        """Give rank 0's parameters whole tensors of their own for a while, and let no hook gather or free them."""
        lent: dict[nn.Parameter, Tensor] = {}
        with self.shards.holding(list(self.ema.shadow.values())) if self.ema is not None else nullcontext():
            for name, param in self.params.items():
                value = self.shards.gather(name)
                if self.leads:
                    lent[param] = convert(param, value)
        if self.leads:
            lent |= {param: convert(param, value) for param, value in self.frozen.items()}
        kept = {param: param.data for param in lent}
        with self._without_hooks():
            try:
                for param, value in lent.items():
                    param.data = value
                yield
            finally:
                for param, value in kept.items():
                    param.data = value

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        # As trl's unwrap_model_for_generation does it. On every rank, or they would disagree on the order of modules.
        offload = getattr(self.engine.optimizer, "parameter_offload", None)
        if offload is None:
            yield
            return
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()

    def _load_moments(self, saved: dict[int, dict[str, Any]]) -> None:
        flats = self.shards.flats
        spread = {moment: [torch.zeros_like(flat) for flat in flats] for moment in MOMENTS}
        for moment, parts in spread.items():
            with self.shards.holding(parts):
                for number, name in enumerate(self.params):
                    self.shards.put(name, saved[number][moment])
        step = float(saved[0]["step"])
        for number, flat in enumerate(flats):
            self.optimizer.state[flat] = {
                "step": int(step) if self.offloads else torch.tensor(step, device=flat.device),
                **{moment: parts[number] for moment, parts in spread.items()},
            }

    def _unsharded_norm(self) -> Tensor:
        # Stage 0 clips without telling the norm.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
        scaler = self.engine.torch_autocast_z0_gradscaler
        return norm / scaler.get_scale() if scaler is not None else norm

    def _scaler_state(self) -> dict[str, Any]:
        if self.stage == 0:
            return self.engine.torch_autocast_z0_gradscaler.state_dict()
        fresh = torch.amp.GradScaler(self.device.type).state_dict()
        return {**fresh, "scale": float(self.engine.optimizer.loss_scale)}

    def _load_scaler(self, saved: dict[str, Any]) -> None:
        if self.stage == 0:
            self.engine.torch_autocast_z0_gradscaler.load_state_dict(saved)
        else:
            self.engine.optimizer.loss_scaler.cur_scale = saved["scale"]


class _InAutocast(nn.Module):
    """The method under autocast: DeepSpeed switches off one that is entered outside of its module."""

    def __init__(self, method: Method, autocast: Callable[[], Any]):
        super().__init__()
        self.method, self.autocast = method, autocast

    def forward(self, batch: Batch) -> Loss:
        """Compute the loss of a batch."""
        with self.autocast():
            return self.method(batch)
