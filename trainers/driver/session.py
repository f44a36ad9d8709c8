"""Connects to the Ray cluster at an address, or starts a private one on this machine."""

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
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.datasets.environment import environment, secrets_hidden
from dreamfleet.datasets.errors import ResourceError
from dreamfleet.datasets.processing.connection import is_connected

logger = logging.getLogger(__name__)

# Ray settings that apply unless the user has set them: no usage reports, no re-creation of a `uv run`
# environment in every worker, health checks every half second instead of every two (which shortens the start
# and end of a run), no progress bars, and CUDA_VISIBLE_DEVICES unchanged in processes without a GPU.
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A private cluster needs neither Ray Train's metrics nor its preemption watcher; each takes a process.
PRIVATE_RAY_SETTINGS = {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: its Ray id, IP address and total resources."""

    node_id: str
    address: str
    resources: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class RaySession:
    """A connection to Ray."""

    private: bool  # Ray was started by this process and ends with it
    address: str

    def nodes(self) -> list[Node]:
        """Return the running machines."""
        import ray

        return [
            Node(entry["NodeID"], entry["NodeManagerAddress"], entry["Resources"])
            for entry in ray.nodes()
            if entry["Alive"]
        ]

    def lost_nodes(self) -> list[str]:
        """Return the addresses of machines that have left the cluster and have not come back."""
        import ray

        here = {node.address for node in self.nodes()}
        gone = {entry["NodeManagerAddress"] for entry in ray.nodes() if not entry["Alive"]}
        return sorted(gone - here)

    def growth_limit(self) -> dict[str, float] | None:
        """Return the maximal resources of an autoscaling cluster; None for a fixed set of machines."""
        # Ray has no public function for this; Ray Train uses the same private one.
        from ray._private.state import state

        return state.get_max_resources_from_cluster_config()

    def free(self) -> dict[str, float]:
        """Return the unused resources, as sums over all machines."""
        import ray

        return ray.available_resources()

    @property
    def own_address(self) -> str:
        """The address at which the cluster's nodes reach this process."""
        import ray

        return "127.0.0.1" if self.private else str(ray.util.get_node_ip_address())

    @property
    def log_folder(self) -> str | None:
        """Folder of the logs of a private cluster's processes; None for another cluster."""
        if not self.private:
            return None
        import ray

        return os.path.join(ray._private.worker.global_worker.node.get_session_dir_path(), "logs")


def names_cluster(address: str | None) -> bool:
    """Return whether ``address`` or RAY_ADDRESS names a cluster."""
    return _target(address) != "local"


def uses_cluster(address: str | None) -> bool:
    """Return whether ``ray_session(address)`` would use a cluster or an open connection; imports no Ray."""
    return names_cluster(address) or is_connected()


@contextmanager
def ray_session(address: str | None = None, *, preload: Sequence[str] = ()) -> Iterator[RaySession]:
    """Connect to ``address``, else to RAY_ADDRESS, else start a private Ray; disconnect at the end.

    If this process is already connected to Ray, that connection is used and stays open. After
    KeyboardInterrupt Ray is not shut down either. The modules in ``preload`` are imported while Ray starts,
    which takes about as long. Raises ResourceError if there is no cluster at the address.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        started_here = ray._private.worker._global_node.is_head()
        yield RaySession(private=started_here, address=ray.get_runtime_context().gcs_address)
        return
    target = _target(address)
    # The imports run in a thread, not ray.init: Linux ends Ray's processes with the *thread* that starts them.
    importing = threading.Thread(target=_import_all, args=(preload,), daemon=True)
    importing.start()
    with (
        authentication(private=target == "local"),
        environment(PRIVATE_RAY_SETTINGS if target == "local" else {}),
    ):
        try:
            if target == "local":
                with secrets_hidden():  # all processes of Ray inherit the environment
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
            # After an interrupt another thread may still be waiting for Ray; if it finds Ray shut down, Ray
            # ends the whole process. A private Ray ends with this process anyway.
            if not isinstance(error, KeyboardInterrupt):
                ray.shutdown()
            raise
        ray.shutdown()


def _target(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or "local"


_QUIET_INIT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _join(target: str) -> Any:
    """Connect to the running cluster at ``target``. Raises ResourceError if that fails."""
    import ray

    remedy = "Give the address of its head node (--address HOST:6379), or leave it out for a local Ray."
    if "://" in target:
        raise ResourceError(
            f"{target} is not an address a training run can join. {remedy} "
            "For http:// addresses use `dreamfleet submit`."
        )
    if target != "auto":
        host, _, port = target.rpartition(":")
        try:
            # Test the port first: Ray would retry for a minute and print many messages.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise ResourceError(f"no Ray cluster answers at {target} ({error}). {remedy}") from error
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # a refused client prints a line every second
    try:
        return ray.init(address=target, **_QUIET_INIT)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise ResourceError(
            f"cannot join the Ray cluster at {target}: {first}. {remedy} A cluster with token authentication needs "
            "RAY_AUTH_TOKEN, or its token in ~/.ray/auth_token; one with TLS needs RAY_USE_TLS and its certificates."
        ) from error


@contextmanager
def authentication(*, private: bool) -> Iterator[None]:
    """Set RAY_AUTH_MODE unless the user has set it, as Ray's default differs between 2.59, 2.60 and 2.61.

    A private Ray listens on the machine's network address, where anyone could run code without a token, so it
    gets a new one. The token is set in the environment, as a file in the home folder would affect a later
    `ray start`. Clusters with and without authentication both accept a client with a token.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    ours = {"RAY_AUTH_MODE": "token"}
    if private:
        ours["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # replaced by the user's token if there is one
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
    # Ray reads the mode at import and the token at its first use, and caches both.
    raylet = importlib.import_module("ray._raylet")  # compiled, without type information
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _object_store_bytes() -> int | None:
    """Return an object store size that fits into /dev/shm; None if Ray's default fits."""
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
