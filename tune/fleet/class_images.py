"""Class images of a fleet: one subject of each class generates them, and the others of the class wait for it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from typing import Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage

FOLDER = "classes"
LOCAL_SECONDS, BUCKET_SECONDS = 0.2, 5.0  # between two looks whether a class is ready


def share_class_images(tree: dict[str, Any], fleet: str) -> str | None:
    """Let a subject's plain recipe use the class images and latents of the fleet in the folder ``fleet``; change it.

    Subjects with equal class prompts, models, resolutions and options of the generation share a folder, also if their
    seeds differ. ``data.class_data_dir`` and ``data.class_cache_dir`` are kept if they are set. Returns a name of the
    set of images; None without prior preservation.
    """
    method, data = tree["method"], tree["data"]
    if not method.get("with_prior_preservation") or data.get("class_prompt") is None:
        return None
    if data.get("class_data_dir") is None:
        made_by = [
            tree["model"],
            data["class_prompt"],
            data["resolution"],
            method["prior_generation_steps"],
            method["prior_generation_guidance"],
        ]
        digest = hashlib.sha256(json_text(made_by).encode()).hexdigest()[:12]
        words = re.sub(r"[^a-z0-9]+", "-", data["class_prompt"].lower()).strip("-")[:40].rstrip("-")
        data["class_data_dir"] = f"{fleet}/{FOLDER}/{words or 'class'}-{digest}"
    if data.get("class_cache_dir") is None and data.get("cache_dir") is None:
        data["class_cache_dir"] = f"{fleet}/{FOLDER}/latents"
    return f"{data['class_data_dir']} {method['num_class_images']}"


class ClassLeaders:
    """Which class images exist, and which subject generates them.

    They exist as soon as the first subject of the class has begun to train, hence has a ``recipe.yaml``: a run writes
    it after it has generated and encoded them. So no two workers generate the same images, also in a bucket, which has
    no locks.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._ready: set[str] = set()
        self._leaders: dict[str, Storage] = {}  # class -> run folder of the subject that generates its images
        self._looked: dict[str, float] = {}
        self._clock = clock

    def may_start(self, name: str) -> bool:
        """Return whether a subject of a class may start: its images exist, or nobody generates them yet."""
        return name in self._ready or name not in self._leaders

    def start(self, name: str, run_folder: str) -> None:
        """Note that a subject of a class was started."""
        if name not in self._ready and name not in self._leaders:
            self._leaders[name] = Storage(run_folder)

    def end(self, name: str, run_folder: str, *, completed: bool) -> bool:
        """Note that a subject ended; return whether subjects of its class may start that could not before."""
        leader = self._leaders.get(name)
        if leader is None or leader != Storage(run_folder):
            return False
        del self._leaders[name]
        if completed:
            self._ready.add(name)
        return True

    def look(self) -> list[str]:
        """Return the classes that became ready since the last call; looks into run folders at intervals."""
        now, found = self._clock(), []
        for name, run in list(self._leaders.items()):
            if now - self._looked.get(name, -BUCKET_SECONDS) < (
                LOCAL_SECONDS if run.is_local else BUCKET_SECONDS
            ):
                continue
            self._looked[name] = now
            try:
                is_ready = run.exists("recipe.yaml")
            except UserError:  # a bucket that cannot be reached now
                continue
            if is_ready:
                del self._leaders[name]
                self._ready.add(name)
                found.append(name)
        return found
