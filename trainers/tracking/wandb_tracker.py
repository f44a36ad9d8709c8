"""Reports runs to Weights & Biases through its client, to a server or to files for a later `wandb sync`."""

from __future__ import annotations

import math
import netrc
import os
import tempfile
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dreamfleet.datasets.environment import secrets_hidden, variable
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.tracking.tracker import PROJECT, TrackedRun, Tracker, flatten, local_folder

if TYPE_CHECKING:  # recipes load without PIL
    from PIL import Image

NAME = "wandb"
OFFLINE = ("offline", "dryrun", "disabled")


class WeightsAndBiases(Tracker):
    """One W&B run. Steps that the server has already are not sent again; a repeated step has the same values.

    ``WANDB_MODE=offline`` writes to ``wandb/`` in WANDB_DIR or ``tracking.folder``: `wandb sync` uploads it. Each
    start of an interrupted run then has a folder there, all with the ID of the run.
    """

    package, extra = "wandb", "wandb"
    variables = (
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_ENTITY",
        "WANDB_PROJECT",
        "WANDB_MODE",
        "WANDB_DIR",
    )

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        with secrets_hidden():  # W&B's service, a process of its own, inherits the environment
            wandb.setup()
        self._id = run.stored_id(NAME) or uuid.uuid4().hex[:12]
        self._temporary = None
        folder = variable("WANDB_DIR") or local_folder(run.recipe)
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(
                prefix="dreamfleet-wandb-", ignore_cleanup_errors=True
            )
            folder = self._temporary.name
        os.makedirs(folder, exist_ok=True)
        tracking = run.recipe.tracking
        self._session = wandb.init(
            project=tracking.project or variable("WANDB_PROJECT") or PROJECT,
            id=self._id,
            name=run.name,
            group=tracking.group,
            config={**run.parameters, "run_folder": run.folder.path(), "versions": dict(run.versions)},
            allow_val_change=True,
            resume="allow",
            reinit="create_new",  # trainings of a pack share the process
            dir=folder,
            save_code=False,
            # No terminal output, Git remotes or arguments: they may hold secrets, and are not this run's alone.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_meta=True,
                init_timeout=60,
                **_proxies(),
            ),
        )
        run.store_id(NAME, self._id)
        self._first = int(self._session.step)  # a run that the server knows begins after its last step

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raise RecipeError without a key, except offline, and for offline files without a folder on disk."""
        if (variable("WANDB_MODE") or "online") in OFFLINE:
            if not variable("WANDB_DIR") and local_folder(recipe) is None:
                raise RecipeError(
                    "report_to: wandb offline writes files: set WANDB_DIR or tracking.folder to a folder on disk, "
                    "since output_dir is in a bucket"
                )
        elif "WANDB_API_KEY" not in cls.environment():
            raise RecipeError(
                "report_to: wandb needs a key: set WANDB_API_KEY in the environment, run `wandb login` once, "
                "or set WANDB_MODE=offline"
            )

    @classmethod
    def environment(cls) -> dict[str, str]:
        """Return the variables to send, with the key that `wandb login` stored on this machine."""
        found = super().environment()
        if "WANDB_API_KEY" not in found and (key := _stored_key(found.get("WANDB_BASE_URL"))):
            found["WANDB_API_KEY"] = key
        return found

    def log(self, line: Mapping[str, Any]) -> None:
        """Log the finite numbers of a line of metrics at its step."""
        values = {
            name: value
            for name, value in flatten(line).items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        if line["step"] >= self._first:
            self._session.log(values, step=line["step"])

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Log an image at a step."""
        import wandb

        if step >= self._first:
            self._session.log({tag: wandb.Image(image)}, step=step)

    def close(self, results: Mapping[str, Any] | None) -> None:
        """Store the paths of the artifacts, and end the session; the server shows a run without results as failed."""
        if results is not None:
            exports = [self.run.folder.path("exports", name) for name in results.get("exports", ())]
            self._session.summary.update({"exit_reason": results.get("exit_reason"), "exports": exports})
        self._session.finish(exit_code=0 if results is not None else 1)
        if self._temporary is not None:
            self._temporary.cleanup()


def _proxies() -> dict[str, str]:
    """Return the proxies as settings, since the service does not see those with a password in its environment."""
    names = ("http_proxy", "https_proxy")
    return {name: value for name in names if (value := variable(name) or variable(name.upper()))}


def _stored_key(server: str | None) -> str | None:
    """Return the key that `wandb login` stored in the netrc file; None without one."""
    host = urlsplit(server or "https://api.wandb.ai").hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
