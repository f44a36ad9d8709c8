"""The Ray cluster a run uses: a private local one or an address, kept quiet, and checked before work starts."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreamfleet.datasets.environment import environment, secrets_hidden
from dreamfleet.datasets.errors import ResourceError

logger = logging.getLogger(__name__)

# Ray's own switches, set where the user has not: no usage reports, no re-creation of a `uv run` environment in
# every worker, and answers from the workers every half second instead of every two (it shortens every start and end).
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# On a cluster of our own nothing reads Train's metrics and no cloud takes machines away; each would cost a process.
QUIET_LOCAL = {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    node_id: str
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class RaySession:
    """A connection to Ray."""

    private: bool  # started by this process and ending with it
    address: str

    def nodes(self) -> list[Node]:
        """List the living machines."""
        import ray

        return [
            Node(entry["NodeID"], entry["NodeManagerAddress"], entry["Resources"])
            for entry in ray.nodes()
            if entry["Alive"]
        ]

    def growth_limit(self) -> dict[str, float] | None:
        """Return the most an autoscaling cluster may grow to, by resource; None for a fixed set of machines."""
        # The one place where Ray keeps it; Ray Train itself reads it there.
        from ray._private.state import state

        return state.get_max_resources_from_cluster_config()

    def free(self) -> dict[str, float]:
        """Return what nobody uses at this moment, summed over the machines."""
        import ray

        return ray.available_resources()

    @property
    def log_folder(self) -> str | None:
        """Where a private cluster keeps the logs of its processes."""
        if not self.private:
            return None
        import ray

        return os.path.join(ray._private.worker.global_worker.node.get_session_dir_path(), "logs")


def starts_private_ray(address: str | None) -> bool:
    """Whether ray_session(address) would start a Ray of its own."""
    import ray

    return not ray.is_initialized() and _target(address) == "local"


@contextmanager
def ray_session(address: str | None = None, *, preload: Sequence[str] = ()) -> Iterator[RaySession]:
    """Connect to ``address``, else to RAY_ADDRESS, else start a private Ray on this machine; leave it at the end.

    A Ray that this process already uses is used as it is and left running; after KeyboardInterrupt ours is left too.
    ``preload`` names modules that are imported while Ray starts, which takes as long. Raises ResourceError when there
    is no cluster at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        started_here = ray._private.worker._global_node.is_head()
        yield RaySession(private=started_here, address=ray.get_runtime_context().gcs_address)
        return
    target = _target(address)
    # Imports run in the thread, not ray.init: Linux ends Ray's processes together with the *thread* that started them.
    importing = threading.Thread(target=_import_all, args=(preload,), daemon=True)
    importing.start()
    with authentication(private=target == "local"), environment(QUIET_LOCAL if target == "local" else {}):
        try:
            if target == "local":
                with secrets_hidden():  # every process of Ray's inherits the environment
                    context = ray.init(
                        address="local",
                        object_store_memory=_object_store_bytes(),
                        **_QUIET_INIT,
                        include_dashboard=False,
                    )
            else:
                context = _join(target)
            importing.join()
            yield RaySession(private=target == "local", address=context.address_info.get("address") or target)
        except BaseException as error:
            # Left in a hurry, another thread may still wait for Ray, and Ray ends the whole process when that thread
            # finds it shut down. It ends with the process anyway.
            if not isinstance(error, KeyboardInterrupt):
                ray.shutdown()
            raise
        ray.shutdown()


def _target(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or "local"


_QUIET_INIT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _join(target: str) -> Any:
    """Connect to a cluster that is already there."""
    import ray

    way_out = "Give the address of its head node (--address HOST:6379), or leave it out for a local Ray."
    if "://" in target:
        raise ResourceError(
            f"{target} is not an address a training run can join. {way_out} "
            "For http:// addresses use `dreamfleet submit`."
        )
    if target != "auto":
        host, _, port = target.rpartition(":")
        try:
            # Ray itself would try for a minute and print a page.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise ResourceError(f"no Ray cluster answers at {target} ({error}). {way_out}") from error
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # a refused client would print a line a second
    try:
        return ray.init(address=target, **_QUIET_INIT)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise ResourceError(
            f"cannot join the Ray cluster at {target}: {first}. {way_out} A cluster with token authentication needs "
            "RAY_AUTH_TOKEN, or its token in ~/.ray/auth_token."
        ) from error


@contextmanager
def authentication(*, private: bool) -> Iterator[None]:
    """Set RAY_AUTH_MODE outright where the user has not, for Ray's default differs between 2.59, 2.60 and 2.61.

    A private Ray listens on the machine's network address, and whoever reaches an open one can run code there: it gets
    a token of its own, made for this run and kept in the environment, so that no file in the home folder changes how a
    later `ray start` behaves. A cluster we join decides for itself; a client that has a token is let in by both kinds.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    ours = {"RAY_AUTH_MODE": "token"}
    if private:
        ours["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # or the person's own, where one is set
    elif not _has_token():
        ours["RAY_AUTH_MODE"] = "disabled"
    try:
        with environment(ours):
            _reread_authentication()
            yield
    finally:
        _reread_authentication()


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return os.path.exists(os.path.expanduser("~/.ray/auth_token"))


def _reread_authentication() -> None:
    # Ray reads the mode when it is imported and the token when first used, and keeps both.
    raylet = importlib.import_module("ray._raylet")  # compiled: nothing in it is typed
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _object_store_bytes() -> int | None:
    """Return a size for the object store that fits in /dev/shm; None where Ray's own choice does."""
    try:
        room = shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = int(0.3 * memory)
    smallest = 80 * 2**20  # Ray refuses less than 75 MiB
    return None if wanted < room else max(smallest, int(0.8 * room))


def _import_all(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
