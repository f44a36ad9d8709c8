"""A Ray head node that accepts jobs with a token, and the command line as its client."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner, Result

from dreamfleet.cluster.cli.program import app

SECRET = "open-sesame"


@dataclass(frozen=True)
class Head:
    """A Ray head node that accepts jobs from clients with its token."""

    address: str
    token: str
    folder: Path

    def answers(self) -> bool:
        request = urllib.request.Request(
            f"{self.address}/api/version", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except OSError:
            return False


def dreamfleet(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert SECRET not in result.output
    return result


def process_of(job_id: str, module: str) -> int:
    """Return the ID of the process of a job that runs a module."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if f"\0{module}\0train".encode() in command and job_id.encode() in variables:
            return int(process.name)
    raise AssertionError(f"{job_id} has no process of {module}")
