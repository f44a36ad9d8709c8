"""Loaded by each Python process of a laboratory's machines: writes what training processes do to $LAB_TRACE.

One JSON line for each event: ``start`` and ``end`` of a worker, ``step`` (an optimizer step is complete), ``upload``
(a file of a checkpoint is about to be written), ``saved`` (its manifest is written) and ``restore``. While the file
$LAB_TRACE.hold exists, the upload of a checkpoint's engine file waits, so that a fault can strike in the middle of a
save; $LAB_TRACE.slow holds seconds by which each step is lengthened. Nothing that dreamfleet computes is changed.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time

TRACE = os.environ.get("LAB_TRACE", "")
HOLD_SECONDS = 120


def note(event, **details):
    """Append an event to the trace; a full or missing disk is ignored."""
    line = json.dumps({"t": time.time(), "pid": os.getpid(), "event": event, **details}) + "\n"
    try:
        descriptor = os.open(TRACE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)
    except OSError:
        pass


def _rank():
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _packed_run():
    """Return the name of the run whose code runs, where several share a process; empty for one alone."""
    module = sys.modules.get("dreamfleet.trainers.packing.slot")
    slot = module._running.get() if module else None
    return slot.task.name if slot else ""


def _watch_run(module):
    real = module.run_worker

    @functools.wraps(real)
    def run_worker(recipe, *args, **options):
        note("start", rank=options.get("rank", 0), run=recipe.run_name)
        try:
            return real(recipe, *args, **options)
        finally:
            kind = sys.exc_info()[0]
            note("end", error=kind.__name__ if kind else None)

    module.run_worker = run_worker


def _watch_engine(module):
    real = module.TorchEngine.step

    @functools.wraps(real)
    def step(self, rates, number):
        result = real(self, rates, number)
        try:
            with open(f"{TRACE}.slow") as file:
                time.sleep(float(file.read()))
        except (OSError, ValueError):
            pass
        note("step", rank=_rank(), step=number, run=_packed_run())
        return result

    module.TorchEngine.step = step


def _is_engine(address):
    name = address.rsplit("/", 1)[1]  # engine.pt, or engine.attempt-0002.pt
    return name.startswith("engine.") and name.endswith(".pt")


def _watch_storage(module):
    real_upload, real_write = module.Storage.upload, module.Storage.write_bytes

    @functools.wraps(real_upload)
    def upload(self, local_path, rel="", *args, **options):
        address = self.path(rel)
        if "/checkpoints/step-" in address and not os.path.isdir(local_path):
            note("upload", file=address)
            deadline = time.time() + HOLD_SECONDS
            while _is_engine(address) and os.path.exists(f"{TRACE}.hold") and time.time() < deadline:
                time.sleep(0.02)
        return real_upload(self, local_path, rel, *args, **options)

    @functools.wraps(real_write)
    def write_bytes(self, rel, *args, **options):
        result = real_write(self, rel, *args, **options)
        address = self.path(rel)
        if "/checkpoints/step-" in address and "/manifest." in address:
            note("saved", step=int(address.rsplit("/step-", 1)[1].split("/")[0]))
        return result

    module.Storage.upload, module.Storage.write_bytes = upload, write_bytes


def _watch_checkpoints(module):
    real = module.Checkpoints.load

    @functools.wraps(real)
    def load(self, step):
        found = real(self, step)
        note("restore", step=step)
        return found

    module.Checkpoints.load = load


WATCHED = {
    "dreamfleet.trainers.run.run": _watch_run,
    "dreamfleet.trainers.engines.torch_engine": _watch_engine,
    "dreamfleet.trainers.run.checkpoint": _watch_checkpoints,
    "dreamfleet.datasets.storage.storage": _watch_storage,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules by the other finders, and changes them after they are executed."""

    def find_spec(self, name, path=None, target=None):
        """Return the real spec of a watched module, with a loader that also watches it."""
        watch = WATCHED.get(name)
        if watch is None:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            watch(module)

        spec.loader.exec_module = exec_module
        return spec


if TRACE:
    sys.meta_path.insert(0, Finder())
