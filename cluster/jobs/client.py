"""Client of a Ray cluster's job server: submit, list, follow and stop jobs, and read why one failed."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dreamfleet.cluster.jobs.job import OURS, Job
from dreamfleet.datasets.errors import ResourceError, UserError
from dreamfleet.trainers.driver.session import authentication

DEFAULT_ADDRESS = (
    "http://127.0.0.1:8265"  # where `ray dashboard ray_config.yaml` forwards a cluster's dashboard
)
ANSWER_SECONDS = 10.0
POLL_SECONDS = 1.0
TOKEN_ADVICE = (
    "Set RAY_AUTH_TOKEN to the cluster's token, or put it into ~/.ray/auth_token (`ray get-auth-token` shows it on the "
    "head node)"
)

# Loggers of uploads, closed connections and large files in a package.
QUIET = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")

Write = Callable[[str], None]


class JobServer:
    """The jobs of one cluster. All methods raise UserError with a remedy if the server fails or refuses."""

    def __init__(self, client: Any, address: str):
        self.client, self.address = client, address

    def submit(
        self, entrypoint: str, *, job_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        """Upload the job's files, unless the cluster has them already, and start the job."""
        with _explained(self.address):
            self.client.submit_job(
                entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env, metadata=metadata
            )

    def job(self, job_id: str) -> Job:
        """Return the state of a job."""
        with _explained(self.address, job_id):
            return _read(self.client.get_job_info(job_id))

    def jobs(self) -> list[Job]:
        """Return the jobs that dreamfleet submitted, oldest first."""
        with _explained(self.address):
            found = [_read(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted((job for job in found if OURS in job.metadata), key=lambda job: job.started or 0)

    def versions(self) -> tuple[str, str]:
        """Return the versions of Python and Ray on the head node."""
        found = self._get("/api/v0/cluster_metadata")["data"]
        return found["pythonVersion"], found["rayVersion"]

    def nodes(self) -> list[str]:
        """Return the IDs of the running nodes."""
        found = self._get("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        return [node["node_id"] for node in found if node["state"] == "ALIVE"]

    def gangs(self) -> dict[str, bool]:
        """Return whether Ray has granted the placement groups that drivers have asked for, by the drivers' IDs."""
        found = self._get("/api/v0/placement_groups?limit=10000")["data"]["result"]["result"]
        granted: dict[str, bool] = {}
        for group in found:
            if group["state"] != "REMOVED":
                driver = group["creator_job_id"]
                granted[driver] = granted.get(driver, False) or group["state"] == "CREATED"
        return granted

    def logs(self, job_id: str) -> str:
        """Return the complete output of a job."""
        with _explained(self.address, job_id):
            return self.client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Write, *, skip: int = 0) -> Job:
        """Pass the output of a job to ``write`` until it ends, and return its final state.

        The first ``skip`` characters of its log are skipped. A lost connection is opened again.
        """
        import aiohttp

        output = _NewOutput(write, skip)
        while True:
            try:
                asyncio.run(self._tail(job_id, output))
            except (OSError, RuntimeError, aiohttp.ClientError):
                pass  # the next request shows whether the cluster still answers
            job = self.job(job_id)
            if job.is_over:
                return job
            time.sleep(POLL_SECONDS)

    def stop(self, job_id: str) -> None:
        """Ask a job to save a checkpoint and end; return without waiting."""
        with _explained(self.address, job_id):
            self.client.stop_job(job_id)

    def _get(self, path: str) -> Any:
        with _explained(self.address):
            # The only request of Ray's client that sends its token and certificates to any path.
            answer = self.client._do_request("GET", path)
            if answer.status_code != 200:
                self.client._raise_error(answer)
            return answer.json()

    async def _tail(self, job_id: str, output: _NewOutput) -> None:
        output.rewind()
        async for text in self.client.tail_job_logs(job_id):
            output.write(text)


@contextmanager
def job_server(address: str | None = None) -> Iterator[JobServer]:
    """Connect to the job server at ``address``, RAY_API_SERVER_ADDRESS or RAY_ADDRESS, with the token of this machine.

    Raises ResourceError within seconds for an address that is invalid, does not answer, or refuses the token.
    """
    address = job_address(address, os.environ)
    _check_answer(address)
    with authentication(private=False), _address_for_ray(address):
        from ray.job_submission import JobSubmissionClient

        for name in QUIET:
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
        with _explained(address):
            # Its requests would ignore SSL_CERT_FILE, which the other connections read.
            client = JobSubmissionClient(address, verify=os.environ.get("SSL_CERT_FILE") or True)
        yield JobServer(client, address)


def job_address(address: str | None, environment: Mapping[str, str]) -> str:
    """Choose the job server's address as Ray's own tools do. Raises ResourceError for an invalid one."""
    address = address or environment.get("RAY_API_SERVER_ADDRESS")
    if not address:
        joined = environment.get("RAY_ADDRESS", "")  # Ray's older name; runs also connect to this address
        address = joined if joined.startswith(("http://", "https://")) else DEFAULT_ADDRESS
    address = address.rstrip("/")
    scheme, separator, rest = address.rpartition("://")
    if scheme in ("http", "https") and rest:
        return address
    host = rest.rpartition(":")[0] or rest or "HEAD"
    kind = "of the Ray Client" if separator else "without http://"
    raise ResourceError(
        f"{address} is an address {kind}. Jobs are submitted to the dashboard, on port 8265 of the head node: "
        f"--address http://{host}:8265"
    )


class _NewOutput:
    """Writes only the new part of a log, even if the log is read again from its beginning."""

    def __init__(self, write: Write, skip: int):
        self._write, self.written, self.position = write, skip, 0

    def rewind(self) -> None:
        self.position = 0

    def write(self, text: str) -> None:
        self.position += len(text)
        new = self.position - self.written
        if new > 0:
            self._write(text[-new:])
            self.written = self.position


def _read(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    return Job(
        id=details.submission_id or details.job_id,
        state=str(getattr(details.status, "value", details.status)),
        metadata=details.metadata or {},
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
        driver_exit_code=details.driver_exit_code,
        message=details.message or "",
        error_type=getattr(details, "error_type", None),
        driver=details.job_id,
    )


def _check_answer(address: str) -> None:
    """Raise ResourceError if nothing answers; Ray's own client would wait for minutes."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the server answered, even if it refused the request without a token
    except (OSError, ValueError) as error:
        raise _unreachable(address, getattr(error, "reason", error)) from error


def _unreachable(address: str, why: object) -> ResourceError:
    if isinstance(why, ssl.SSLCertVerificationError):
        return ResourceError(
            f"the certificate of {address} is not trusted ({why.verify_message}): set SSL_CERT_FILE to a file with the "
            "certificate of its authority"
        )
    return ResourceError(
        f"no Ray job server answers at {address} ({why}). Give the head node's dashboard: --address http://HEAD:8265, "
        f"or RAY_API_SERVER_ADDRESS; `ray dashboard ray_config.yaml` forwards it to {DEFAULT_ADDRESS}"
    )


@contextmanager
def _explained(address: str, job_id: str | None = None) -> Iterator[None]:
    """Convert errors of Ray's client into UserErrors."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ResourceError(
            f"the Ray cluster at {address} refused this client: its token is missing on this machine, or differs. "
            f"{TOKEN_ADVICE}; RAY_AUTH_MODE must be 'token' or unset"
        ) from error
    except OSError as error:  # the errors of requests are OSErrors
        raise _unreachable(address, error) from error
    except RuntimeError as error:
        if job_id is not None and "status code 404" in str(error):
            raise UserError(f"{address} has no job {job_id}; `dreamfleet jobs` lists them") from error
        last = str(error).strip(" .\n").rpartition("\n")[2]  # the error line of a traceback of the server
        raise ResourceError(f"the Ray cluster at {address} refused: {last}") from error


@contextmanager
def _address_for_ray(address: str) -> Iterator[None]:
    # Ray's client uses RAY_API_SERVER_ADDRESS, and next RAY_ADDRESS, instead of its argument.
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
