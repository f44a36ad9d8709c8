"""Tests that reading a recipe imports no heavy library, so that commands such as `--help` start fast."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("PIL", "diffusers", "numpy", "pyarrow", "ray", "s3fs", "torch", "transformers")
COMMANDS = [["--help"], ["methods"], *(["config", str(path)] for path in (ROOT / "recipes").glob("*.yaml"))]
RUN_COMMANDS = f"""
from dreamfleet.cluster.cli.program import app
for arguments in {COMMANDS}:
    app(arguments, standalone_mode=False)
"""


@pytest.mark.parametrize("code", ["import dreamfleet.trainers.recipe", RUN_COMMANDS])
def test_no_heavy_library_is_imported(code: str) -> None:
    code += f"\nimport sys\nprint('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
