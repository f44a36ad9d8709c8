"""Installs the simulated GPUs in every Python process that imports torch, where ``SIMULATED_GPUS`` says how many.

On the PYTHONPATH of Ray's workers: nothing of ours runs there before torch is imported.
"""

import importlib.abc
import importlib.util
import os
import sys


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Installs the GPUs right after torch's own import."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Find torch as usual, with the installation after its code; leave other modules alone."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        execute = spec.loader.exec_module

        def execute_and_install(module):  # type: ignore[no-untyped-def]
            execute(module)
            import simulated_gpu

            simulated_gpu.install(devices=int(os.environ["SIMULATED_GPUS"]))

        spec.loader.exec_module = execute_and_install
        return spec


if os.environ.get("SIMULATED_GPUS"):
    sys.meta_path.insert(0, _AfterTorch())
