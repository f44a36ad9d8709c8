"""Installs ``SIMULATED_GPUS`` simulated GPUs in every Python process that imports torch.

This folder is on the PYTHONPATH of Ray's workers, because no code of ours runs in them before torch is
imported.
"""

import importlib.abc
import importlib.util
import os
import sys


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Import hook that installs the GPUs directly after the import of torch."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Return torch's module spec, extended by the installation; return None for other modules."""
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
