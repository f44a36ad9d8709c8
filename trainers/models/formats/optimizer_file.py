"""Reads and writes the webui's optimizer files, `NAME.pt.optim` beside an embedding or a hypernetwork.

The webui resumes training with them. Format (webui, `modules/textual_inversion/textual_inversion.py` and
`modules/hypernetworks/hypernetwork.py`): the state of a torch AdamW with one parameter group, and a hash of the
artifact that it belongs to.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.models.formats.pickle_writer import is_real, load_pickle, require_backed, save_pickle

log = logging.getLogger(__name__)
SUFFIX = ".optim"  # appended to the full file name of the artifact

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOST_PARAMETERS = 10_000


@dataclass(frozen=True)
class AdamState:
    """Adam's state of one parameter: number of steps, and the two moments in the parameter's shape."""

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class OptimizerFile:
    """The content of a `.optim`: `states` of the parameters in the webui's order, and the hash of the artifact.

    `name`: the optimizer's class name, which is stored only for hypernetworks.
    """

    hash: str
    states: tuple[AdamState, ...]
    name: str | None = None


def write_optimizer(
    beside: str | os.PathLike[str],
    file: OptimizerFile,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Path:
    """Write the `.optim` file of an embedding or a hypernetwork, beside its `.pt` at ``beside``.

    The learning rate is written as 0, since the webui's schedule sets it before each step. Raises FormatError for NaN
    or infinite moments.
    """
    path = Path(f"{beside}{SUFFIX}")
    state = {}
    for number, adam in enumerate(file.states):
        _check(adam, path)
        state[number] = {"step": torch.tensor(float(adam.step))} | {
            moment: getattr(adam, moment).detach().float().cpu() for moment in _MOMENTS
        }
    group = {
        "lr": 0.0,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": False,
        "foreach": None,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "params": list(range(len(file.states))),
    }
    named = {} if file.name is None else {"optimizer_name": file.name}
    held = {"hash": file.hash, "optimizer_state_dict": {"state": state, "param_groups": [group]}}
    return save_pickle({**named, **held}, path)


def read_optimizer(path: str | os.PathLike[str], shapes: Sequence[Sequence[int]]) -> OptimizerFile:
    """Read a `.optim` for parameters of these shapes, in order. Raises FormatError if it is not one or does not fit."""
    path = Path(path)
    data = load_pickle(path)
    held = data.get("optimizer_state_dict") if isinstance(data, dict) else None
    state = held.get("state") if isinstance(held, dict) else None
    if not isinstance(state, dict) or not isinstance(data.get("hash"), str):
        raise FormatError(
            f"{path}: not an optimizer file of the webui (no hash with an optimizer_state_dict)."
        )
    if len(state) > _MOST_PARAMETERS or list(state) != list(range(len(shapes))):
        raise FormatError(
            f"{path}: contains the state of {len(state)} parameters, but {len(shapes)} are trained; it may belong "
            "to another file"
        )
    states = tuple(
        _adam(entry, list(shape), path) for entry, shape in zip(state.values(), shapes, strict=True)
    )
    name = data.get("optimizer_name")
    return OptimizerFile(data["hash"], states, name if isinstance(name, str) else None)


def moments_beside(address: str, *, fits: str, shapes: Sequence[Sequence[int]]) -> tuple[AdamState, ...]:
    """Return Adam's states from the `.optim` beside an artifact, on disk or in a bucket; () if none matches.

    ``fits``: the hash of the artifact. A damaged `.optim`, or that of another artifact, is ignored with a warning.
    """
    beside = f"{address}{SUFFIX}"
    try:
        place = Storage(beside)
        if not place.exists():
            return ()
        with place.local_copy() as local:
            found = read_optimizer(local, shapes)
        if found.hash != fits:
            raise FormatError(f"{beside}: belongs to another file than the artifact in the same folder.")
        if found.name not in (None, "Adam", "AdamW"):
            raise FormatError(f"{beside}: was written by {found.name}, whose state is not Adam's.")
    except UserError as error:
        log.warning("ignored, so the optimizer starts from scratch: %s", error)
        return ()
    return found.states


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the 10 hex digits by which the webui matches a `.optim` to a hypernetwork; embeddings use a checksum."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def _adam(entry: Any, shape: list[int], path: Path) -> AdamState:
    if not isinstance(entry, dict):
        raise FormatError(f"{path}: holds a {type(entry).__name__} where a parameter's moments should be.")
    step = entry.get("step")
    step = step.item() if is_real(step) and step.numel() == 1 else step
    if not isinstance(step, int | float) or not 0 <= step < 1e12:
        raise FormatError(f"{path}: its step is not a number of steps.")
    moments: list[Tensor] = []
    for name in _MOMENTS:
        moment = entry.get(name)
        if not is_real(moment) or list(moment.shape) != shape:
            raise FormatError(f"{path}: its moments are not Adam's for a parameter of shape {shape}.")
        require_backed([moment], path)
        moments.append(moment.detach().float())
    adam = AdamState(float(step), *moments)
    _check(adam, path)
    return adam


def _check(adam: AdamState, path: Path) -> None:
    if not all(torch.isfinite(moment).all() for moment in (adam.exp_avg, adam.exp_avg_sq)):
        raise FormatError(f"{path}: its moments hold NaN or infinite numbers.")
    if (adam.exp_avg_sq < 0).any():
        raise FormatError(f"{path}: its second moments are negative, which squares cannot be.")
