"""Reports runs to MLflow through its client, to a server or to a local database."""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.environment import variable
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.tracking.tracker import PROJECT, TrackedRun, Tracker, flatten, local_folder

if TYPE_CHECKING:  # recipes load without PIL
    from PIL import Image

log = logging.getLogger(__name__)
NAME = "mlflow"
LONGEST = 5000  # characters of a value that every store of MLflow accepts
MOST = 100  # parameters in one request
CLOSE_SECONDS = 120  # how long the end of a run waits for a slow server


class MLflow(Tracker):
    """One MLflow run: parameters are the recipe, and values of a step that it already has are not stored again.

    Requests are sent by a thread, so that a slow server does not delay a step. Without MLFLOW_TRACKING_URI, the
    database ``mlflow.db`` and ``mlflow-artifacts/`` are in ``tracking.folder``.
    """

    package, extra = "mlflow", "mlflow"
    variables = (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_INSECURE_TLS",
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_S3_ENDPOINT_URL",
    )

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=_tracking_uri(run.recipe))
        stored = run.stored_id(NAME)
        self._known: dict[str, set[int]] = {}  # steps whose values a run that continues already has
        self._id = stored or self._create()
        if stored is None:
            run.store_id(NAME, self._id)
        else:
            self._client.update_run(stored, status="RUNNING")
        self._continues = run.start_step > 0
        self._log_parameters()
        self._sender = _Sender()

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raise RecipeError for a run in a bucket without a server."""
        if not variable("MLFLOW_TRACKING_URI") and local_folder(recipe) is None:
            raise RecipeError(
                "report_to: mlflow needs MLFLOW_TRACKING_URI in the environment, the address of an MLflow server, "
                "since output_dir is in a bucket; or set tracking.folder to a folder on disk"
            )

    def log(self, line: Mapping[str, Any]) -> None:
        """Send the finite numbers of a line of metrics."""
        step, now = int(line["step"]), int(time.time() * 1000)
        values = {
            name: float(value)
            for name, value in flatten(line).items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._sender.put(lambda: self._send(values, step, now))

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Send an image as the artifact ``TAG/step-000000.png``."""
        copy = image.copy()
        self._sender.put(
            lambda: self._client.log_image(self._id, copy, artifact_file=f"{tag}/step-{step:06d}.png")
        )

    def flush(self) -> None:
        """Raise an error that a request had since the last call."""
        self._sender.raise_error()

    def close(self, results: Mapping[str, Any] | None) -> None:
        """Send what waits, the results and the paths of the artifacts, and end the MLflow run."""
        states = {"completed": "FINISHED", "interrupted": "KILLED"}
        state = states.get(str((results or {}).get("exit_reason")), "FAILED")
        exports = [self.run.folder.path("exports", name) for name in (results or {}).get("exports", ())]
        if exports:
            self._sender.put(lambda: self._tag({"dreamfleet.exports": "\n".join(exports)}))
        self._sender.put(lambda: self._client.set_terminated(self._id, state))
        self._sender.close()

    def _create(self) -> str:
        recipe = self.run.recipe
        project = recipe.tracking.project or variable("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(project)
        folder = local_folder(recipe)
        if found is not None:
            experiment = found.experiment_id
        else:
            is_server = bool(variable("MLFLOW_TRACKING_URI")) or folder is None
            place = None if is_server else (Path(str(folder)) / "mlflow-artifacts" / project).as_uri()
            try:
                experiment = self._client.create_experiment(project, artifact_location=place)
            except Exception:  # created by another run in the meantime
                found = self._client.get_experiment_by_name(project)
                if found is None:
                    raise
                experiment = found.experiment_id
        tags = {"dreamfleet.run_folder": self.run.folder.path(), "dreamfleet.method": recipe.method.name}
        tags |= {"dreamfleet.group": recipe.tracking.group} if recipe.tracking.group else {}
        tags |= {f"version.{name}": value for name, value in self.run.versions.items()}
        return str(self._client.create_run(experiment, tags=tags, run_name=self.run.name).info.run_id)

    def _log_parameters(self) -> None:
        """Log the recipe; a parameter that a resumed run changed becomes a tag, as MLflow's parameters are final."""
        from mlflow.entities import Param

        before = self._client.get_run(self._id).data.params
        now = {key: str(value)[:LONGEST] for key, value in self.run.parameters.items()}
        new = [Param(key, value) for key, value in now.items() if key not in before]
        for start in range(0, len(new), MOST):
            self._client.log_batch(self._id, params=new[start : start + MOST])
        self._tag({f"changed.{key}": value for key, value in now.items() if before.get(key, value) != value})

    def _tag(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_tag(self._id, key, value[:LONGEST])

    def _send(self, values: Mapping[str, float], step: int, now: int) -> None:
        from mlflow.entities import Metric

        new = [Metric(name, value, now, step) for name, value in values.items() if self._is_new(name, step)]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def _is_new(self, name: str, step: int) -> bool:
        if not self._continues:
            return True
        if name not in self._known:
            history = self._client.get_metric_history(self._id, name)
            self._known[name] = {entry.step for entry in history}
        return step not in self._known[name]


class _Sender:
    """Sends requests in order in a thread; after an error, nothing more is sent."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self._thread.start()

    def put(self, request: Callable[[], Any]) -> None:
        self.raise_error()
        self._requests.put(request)

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._requests.put(None)
        self._thread.join(timeout=CLOSE_SECONDS)
        self.raise_error()
        if self._thread.is_alive():
            raise TimeoutError(f"the server did not take all values within {CLOSE_SECONDS} seconds")

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                request()
            except Exception as error:  # noqa: BLE001 - raised at the next call
                self._error = error
                return


def _tracking_uri(recipe: Recipe) -> str:
    if server := variable("MLFLOW_TRACKING_URI"):
        return server
    folder = Path(str(local_folder(recipe)))
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"
