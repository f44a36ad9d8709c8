"""Measures the memory of forward and backward passes on fake tensors, with real autograd, storage by storage.

A tensor of FakeTensorMode has a shape, a dtype and a lifetime, but no memory. A step on such tensors
allocates and frees the same storages as a real step, except those inside kernels. Attention runs as the CPU's
flash kernel, which saves the same tensors as CUDA's flash and memory-efficient kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from dreamfleet.trainers.memory.inputs import Pass

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class _Held:
    size: int
    kind: str = "activation"


class Ledger(TorchDispatchMode):
    """While active, counts the bytes of every new storage until it is freed, of real and fake tensors.

    ``known``: existing tensors, which are not counted. ``params``: parameters whose gradients and casts are counted
    separately.
    """

    def __init__(self, *, known: Iterable[Tensor] = (), params: Collection[nn.Parameter] = ()):
        super().__init__()
        self.live = {"activation": 0, "gradient": 0, "cast": 0}
        self.peak = self.peak_with_gradients = self.casts_at_peak = 0
        self._held: Any = WeakIdKeyDictionary()
        for tensor in (*known, *params):
            self._held[tensor.untyped_storage()] = None
        self._params = {id(param) for param in params}
        self._hooks = [param.register_post_accumulate_grad_hook(self._mark_gradient) for param in params]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record the storages of its results."""
        result = func(*args, **(kwargs or {}))
        casts = func is torch.ops.aten._to_copy.default and id(args[0]) in self._params
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._enter(value.untyped_storage(), "cast" if casts else "activation")
        return result

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    @property
    def total(self) -> int:
        """The bytes allocated now."""
        return sum(self.live.values())

    def _enter(self, storage: Any, kind: str) -> None:
        if storage in self._held or not storage.nbytes():
            return
        held = self._held[storage] = _Held(storage.nbytes(), kind)
        self.live[kind] += held.size
        weakref.finalize(storage, self._leave, held).atexit = False
        self._measure()

    def _leave(self, held: _Held) -> None:
        self.live[held.kind] -= held.size

    def _mark_gradient(self, param: nn.Parameter) -> None:
        assert param.grad is not None
        held = self._held.get(param.grad.untyped_storage())
        if held is not None and held.kind != "gradient":
            self._leave(held)
            held.kind = "gradient"
            self.live["gradient"] += held.size

    def _measure(self) -> None:
        without = self.live["activation"] + self.live["cast"]
        self.peak_with_gradients = max(self.peak_with_gradients, without + self.live["gradient"])
        if without > self.peak:
            self.peak, self.casts_at_peak = without, self.live["cast"]


def fake_mode() -> FakeTensorMode:
    """Return a mode in which new tensors have no memory; a tensor belongs to the mode that created it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[Autocast]:
    """Yield a function that returns the autocast of a pass in ``dtype``, with CUDA's rules within this context.

    CUDA runs normalisation in float32 where the CPU does not (torch docs, "amp", op lists). The rules remain after the
    autocast ends, for layers that checkpointing runs again in the backward pass.
    """
    hook: Any = _widen_norms  # torch's annotation does not allow for a hook that returns new arguments
    handle = register_module_forward_pre_hook(hook)
    try:
        yield lambda: nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    finally:
        handle.remove()


def trace_step(
    compute_loss: Callable[[Autocast], Tensor],
    *,
    params: Collection[nn.Parameter],
    known: Iterable[Tensor],
    dtype: torch.dtype,
) -> Pass:
    """Return the memory of one forward and backward pass in ``dtype``; ``known`` are existing tensors.

    ``compute_loss`` gets the autocast for its forward pass. Tensors may be fake (inside a :func:`fake_mode`) or real.
    Gradients are dropped afterwards.
    """
    with precision(dtype) as autocast, Ledger(known=known, params=params) as ledger:
        loss = compute_loss(autocast)
        held = ledger.total
        loss.backward()
    for param in params:
        param.grad = None
    return Pass(held, ledger.peak, ledger.peak_with_gradients, ledger.casts_at_peak)


@torch.no_grad()
def trace_inference(action: Callable[[], Any], *, known: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Return the maximum of bytes that ``action`` allocates at once in ``dtype``, without gradients."""
    with precision(dtype) as autocast, Ledger(known=known) as ledger, autocast():
        action()
    return ledger.peak


def _widen_norms(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if isinstance(module, nn.GroupNorm | nn.LayerNorm) and torch.is_autocast_enabled("cpu"):
        return tuple(value.float() if isinstance(value, Tensor) else value for value in args)
    return None
