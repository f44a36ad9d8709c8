"""Temporary: the fields of a search that another change adds."""

from __future__ import annotations

from typing import Any


def objective(search: Any) -> str:
    return getattr(search, "objective", None) or search.metric


def metrics(search: Any) -> list[str]:
    return list(getattr(search, "metrics", None) or [search.metric])


def maximises(search: Any, name: str) -> bool:
    return search.maximises(name) if hasattr(search, "maximises") else search.maximise


def best_step(trial: Any) -> int | None:
    return getattr(trial, "best_step", None) or (trial.steps or None)


def front(store: Any) -> list[Any]:
    return store.front() if hasattr(store, "front") else [store.best] if store.best else []


def gpu_seconds(store: Any) -> float:
    return getattr(store, "gpu_seconds", 0.0)
