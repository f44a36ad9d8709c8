"""Test job submission without a cluster: package, metadata and exit code of a job, and server addresses."""

from __future__ import annotations

import http.server
import json
import re
import socket
import ssl
import subprocess
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from importlib.metadata import Distribution, requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from ray._private.runtime_env.packaging import get_uri_for_directory
from typer.testing import CliRunner

from dreamfleet.cluster.cli.program import app
from dreamfleet.cluster.jobs import check_versions
from dreamfleet.cluster.jobs import client as jobs
from dreamfleet.cluster.jobs.client import JobServer, job_address
from dreamfleet.cluster.jobs.code import write_code
from dreamfleet.cluster.jobs.job import Job, make_resume_command
from dreamfleet.cluster.jobs.package import check_here, pack
from dreamfleet.cluster.jobs.submit import (
    find_equal,
    make_entrypoint,
    make_job_id,
    make_metadata,
    read_environment,
    send,
)
from dreamfleet.datasets.errors import RecipeError, ResourceError, UserError
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe

BUCKET = "s3://bucket/run"
START = "exec sh start.sh -m dreamfleet.cluster.jobs.keep"


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    return build_recipe(tiny.make_recipe(folder, **{"output_dir": BUCKET, **changes}), folder=str(folder))


# ---------------------------------------------------------------- the package


def test_local_files_are_packaged_and_the_recipe_finds_them(tmp_path: Path) -> None:
    templates = tmp_path / "words.txt"
    templates.write_text("a photo of [name]\n")
    (tmp_path / "more" / "pictures").mkdir(parents=True)
    tiny.make_images(tmp_path / "more" / "pictures", 2, seed=1, captions=True)
    recipe = make_recipe(
        tmp_path,
        method={"name": "textual_inversion", "placeholder_token": "<cat>", "template_file": str(templates)},
        validation__holdout=str(tmp_path / "more" / "pictures"),  # second folder named "pictures"
        validation__prompts=["/imagine a cat"],  # not a path, although it starts with a slash
    )
    package = pack(recipe)
    assert package.recipe.output_dir == BUCKET
    assert package.recipe.data.instance_data_dir == "./inputs/pictures"
    assert package.recipe.validation.holdout == "./inputs/2-pictures"
    assert package.recipe.validation.prompts == ["/imagine a cat"]

    written = package.write(tmp_path)
    assert written.read_bytes() == pack(recipe).write(tmp_path / "more").read_bytes(), (
        "Ray would upload it again"
    )
    there = tmp_path / "there"
    zipfile.ZipFile(written).extractall(there)
    read = load_recipe(there / "recipe.yaml")
    assert read.data.instance_data_dir == str(there / "inputs" / "pictures")
    assert read.model.pretrained_model_name_or_path == str(there / "inputs" / "model")
    assert (there / "inputs" / "words.txt").read_text() == templates.read_text()
    assert sorted(p.name for p in (there / "inputs" / "2-pictures").iterdir()) == [
        "000.png", "000.txt", "001.png", "001.txt"
    ]  # fmt: skip
    for path in (tmp_path / "model").rglob("*.safetensors"):
        assert (there / "inputs" / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
    check_here(read)


def test_urls_hub_names_and_shared_folders_are_not_packaged(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        model__pretrained_model_name_or_path="some/hub-name",
        data__instance_data_dir="s3://bucket/cat",
        data__class_data_dir="/mnt/everywhere/cats",  # exists on the cluster only
        output_dir="/mnt/everywhere/runs/cat",
    )
    package = pack(recipe, shared=["/mnt/everywhere/"])
    assert package.recipe == recipe
    assert package.files == {}
    check_here(recipe)  # does not check paths and names that are not on this machine


def test_a_concepts_file_is_resolved_before_packaging(tmp_path: Path) -> None:
    tiny.make_images(tmp_path / "set" / "dog", 2)
    entries = [{"instance_data_dir": "dog", "instance_prompt": "sks dog"}]
    (tmp_path / "set" / "concepts.json").write_text(json.dumps(entries))
    data = {"concepts_list": str(tmp_path / "set" / "concepts.json"), "resolution": tiny.RESOLUTION}
    package = pack(make_recipe(tmp_path, data=data))
    assert [concept.instance_data_dir for concept in package.recipe.data.concepts_list or ()] == [
        "./inputs/dog"
    ]
    assert {"inputs/dog/000.png", "inputs/dog/001.png"} < set(package.files)


def test_a_package_over_the_limit_names_the_largest_path_and_remedies(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with open(tmp_path / "pictures" / "huge.png", "wb") as file:
        file.truncate(300 * 2**20)  # sparse file: uses no disk space and is never read
    with pytest.raises(
        RecipeError, match=r"data\.instance_data_dir: .*/pictures .*300 MiB.*200 MiB.*s3://.*--shared"
    ):
        pack(recipe)
    pack(recipe, shared=[str(tmp_path / "pictures")])


def test_local_outputs_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"output_dir .*s3://BUCKET/PREFIX.*--shared"):
        pack(make_recipe(tmp_path, output_dir="runs/cat"))
    with pytest.raises(RecipeError, match=r"output_dir"):  # shares only a string prefix
        pack(make_recipe(tmp_path, output_dir="/mnt/everywhere2/cat"), shared=["/mnt/everywhere"])
    with pytest.raises(RecipeError, match=r"validation\.holdout: .*/nowhere/at/all .*--shared /nowhere/at"):
        pack(make_recipe(tmp_path, validation__holdout="/nowhere/at/all"))
    changes = {"data__class_data_dir": str(tmp_path / "pictures"), "method__with_prior_preservation": True}
    with pytest.raises(RecipeError, match=r"class_data_dir .* 6 .*method\.num_class_images.* 100"):
        pack(make_recipe(tmp_path, **changes))
    pack(make_recipe(tmp_path, **changes, method__num_class_images=6))
    here = make_recipe(tmp_path, output_dir="runs/cat", data__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match=r"data\.cache_dir .*s3://BUCKET/PREFIX.*--shared"):
        pack(here, makes_cache=True)
    kept = make_recipe(tmp_path, output_dir="runs/cat", data__cache_dir="s3://bucket/latents")
    assert pack(kept, makes_cache=True).recipe.data.cache_dir == "s3://bucket/latents"


def test_missing_images_are_reported_before_anything_is_sent(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    for image in (tmp_path / "pictures").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="pictures"):
        check_here(recipe)


def test_the_code_is_copied_with_its_version_and_is_equal_each_time(tmp_path: Path) -> None:
    from dreamfleet.cluster.jobs import package as running

    code, info = write_code(tmp_path)
    assert (code / "cluster/jobs/package.py").read_bytes() == Path(running.__file__).read_bytes()
    assert (code / "trainers/models/pocket/model_index.json").exists()
    assert not [path for path in code.rglob("*") if path.name in ("__pycache__", "tests")]
    (found,) = Distribution.discover(name="dreamfleet", path=[str(tmp_path)])
    assert found.version == version("dreamfleet")
    assert found.requires == requires("dreamfleet")

    def uri_of(folder: Path) -> str:
        return get_uri_for_directory(str(folder), include_gitignore=True)

    again = write_code(tmp_path / "again")
    for first, second in zip((code, info), again, strict=True):
        assert uri_of(first) == uri_of(second), "Ray would send it again"


# ---------------------------------------------------------------- the job


class FakeClient:
    """Ray's job client with scripted logs: a connection yields a list of texts or raises an error."""

    def __init__(self, *connections: list[str | BaseException], states: list[str] | None = None):
        self.connections = list(connections)
        self.states = states or ["SUCCEEDED"]
        self.submitted: dict[str, Any] = {}

    def submit_job(self, **given: Any) -> None:
        runtime_env = given["runtime_env"]
        assert Path(runtime_env["working_dir"]).exists()
        assert all(Path(wheel).exists() for wheel in runtime_env["py_modules"])
        self.submitted = given

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return details(state, submission_id=job_id)

    def list_jobs(self) -> list[SimpleNamespace]:
        return []

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self.connections.pop(0):
            if isinstance(text, BaseException):
                raise text
            yield text


def details(state: str = "RUNNING", **more: Any) -> SimpleNamespace:
    given = {
        "submission_id": "cat-1", "job_id": None, "status": state, "metadata": {}, "start_time": 1000,
        "end_time": None, "driver_exit_code": None, "message": None, **more,
    }  # fmt: skip
    return SimpleNamespace(**given)


def test_a_job_is_sent_with_code_inputs_and_time_to_save(tmp_path: Path) -> None:
    client, reported = FakeClient(), []
    package = pack(make_recipe(tmp_path))
    job_id = send(
        JobServer(client, "http://head:8265"),
        package,
        ["train", "--resume"],
        typed=["train", "my cat.yaml", "--resume"],
        environment={"SECRET": "shh", "TQDM_DISABLE": "0"},
        report=reported.append,
    )
    sent = client.submitted
    assert sent["submission_id"] == job_id
    assert sent["entrypoint"] == f"{START} train recipe.yaml --resume"
    environment = sent["runtime_env"]["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600
    assert environment["DREAMFLEET_OWNER"] == job_id
    assert environment["DREAMFLEET_RESUME_WITH"] == "dreamfleet submit ... -- train 'my cat.yaml' --resume"
    # The user's values take precedence over the defaults.
    assert (environment["SECRET"], environment["TQDM_DISABLE"]) == (
        "shh",
        "0",
    )
    assert "shh" not in json.dumps([sent["metadata"], sent["entrypoint"], reported])
    assert sent["metadata"]["output_dir"] == BUCKET
    assert sent["metadata"]["command"] == "train 'my cat.yaml' --resume"
    assert all(isinstance(value, str) for value in sent["metadata"].values())
    assert f"{len(package.files)} files" in reported[0]


def test_the_job_gets_the_shared_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that a job is given --shared: on an autoscaling cluster, a run accepts only these local paths."""
    client = FakeClient()
    monkeypatch.setattr(jobs, "job_server", lambda address: nullcontext(JobServer(client, "http://head")))
    monkeypatch.setattr(check_versions, "check_cluster", lambda server, say: None)
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tiny.make_recipe(tmp_path))
    words = ["--shared", str(tmp_path), "--", "train", str(recipe), "scaling.num_workers=1", "--resume"]
    result = CliRunner().invoke(app, ["submit", *words, "--shared", "/data", "--shared", "/more"])
    assert result.exit_code == 0, result.output
    options = client.submitted["entrypoint"].partition("recipe.yaml ")[2]
    assert options == f"--resume --shared /data --shared /more --shared {tmp_path}"


def test_the_same_run_is_not_sent_twice_and_another_in_its_folder_is_refused(tmp_path: Path) -> None:
    package = pack(make_recipe(tmp_path))
    metadata = make_metadata(package, ["train", "r.yaml"], what="train")
    running = Job("cat-1", "RUNNING", metadata)

    def find(jobs: list[Job], sent: Any, what: str = "train") -> Job | None:
        return find_equal(jobs, sent, what=what)

    assert find([running], package) == running
    assert find([running], package, "data cache") is None
    assert find([Job("cat-1", "STOPPED", metadata)], package) is None
    assert find([running], pack(make_recipe(tmp_path, output_dir="s3://bucket/other"))) is None
    with pytest.raises(RecipeError, match=r"cat-1.*stop it first.*\n  train\.seed: there 7, here 8$"):
        find([running], pack(make_recipe(tmp_path, train__seed=8)))
    next((tmp_path / "pictures").iterdir()).unlink()
    with pytest.raises(RecipeError, match=r"cat-1.*\n.*files .* changed"):
        find([running], pack(make_recipe(tmp_path, data__instance_data_dir=str(tmp_path / "pictures"))))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [([], "--continue"), (["--resume"], "--resume"), (["--take-over"], "--take-over")],
)
def test_a_job_continues_what_its_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], expected: str
) -> None:
    client = FakeClient()
    monkeypatch.setattr(jobs, "job_server", lambda address: nullcontext(JobServer(client, "http://head")))
    monkeypatch.setattr(check_versions, "check_cluster", lambda server, say: None)
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tiny.make_recipe(tmp_path, output_dir=BUCKET))
    result = CliRunner().invoke(app, ["submit", "--", "train", str(recipe), "scaling.num_workers=1", *typed])
    assert result.exit_code == 0, result.output
    assert client.submitted["entrypoint"].partition("recipe.yaml ")[2] == expected


def test_names_and_commands_of_jobs() -> None:
    assert make_job_id("my cat/√").startswith("my-cat-")
    assert make_job_id("run") != make_job_id("run")
    assert make_entrypoint(["tune"]) == f"{START} tune recipe.yaml"
    cache = ["data cache", "--json"]
    assert make_entrypoint(cache) == f"{START} data cache recipe.yaml --json"
    assert make_resume_command(["train", "r.yaml"]) == "dreamfleet submit ... -- train r.yaml --resume"
    assert make_resume_command(["data", "cache", "r.yaml"]) == "dreamfleet submit ... -- data cache r.yaml"


def test_variables_are_given_or_taken_from_the_environment_and_never_shown() -> None:
    assert read_environment(["A=1=2", "B"], {"B": "two"}) == {"A": "1=2", "B": "two"}
    with pytest.raises(RecipeError, match="C is not set"):
        read_environment(["C"], {})
    with pytest.raises(RecipeError) as caught:
        read_environment(["not a name=secret"], {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 130),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", 127, 1),  # "python" not found on the machine
        ("FAILED", None, 1),  # the job did not start, or its machine failed
    ],
)
def test_exit_code_of_a_job(state: str, driver: int | None, code: int) -> None:
    job = Job("cat-1", state, {}, driver_exit_code=driver)
    assert job.is_over
    assert job.exit_code == code


@pytest.mark.parametrize(
    ("driver", "error_type", "message", "reason", "resumable"),
    [
        (-9, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", "SIGKILL.* memory", True),
        (137, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", "SIGKILL", True),  # by a shell: 128 + signal
        (-11, None, "failed", "SIGSEGV.*compiled", True),
        (-15, None, "failed", "SIGTERM$", True),
        (1, None, "failed", "exit code 1", True),
        (127, None, "failed", "exit code 127", True),
        (255, None, "failed", "exit code 255", True),
        (130, None, "failed", "interrupted", True),
        (2, None, "failed", "exit code 2", False),  # needs a correction by the user
        (None, "JOB_SUPERVISOR_ACTOR_DIED", "its node died.\nID: 1", "its node died$", True),
        (None, "RUNTIME_ENV_SETUP_FAILURE", "no such wheel", "no such wheel", False),
        (None, None, "", "does not say why", False),
    ],
)
def test_reason_and_resume_command_of_a_failed_job(
    driver: int | None, error_type: str | None, message: str, reason: str, resumable: bool
) -> None:
    metadata = {"command": "train 'my cat.yaml' train.seed=1"}
    job = jobs._read(
        details("FAILED", metadata=metadata, driver_exit_code=driver, error_type=error_type, message=message)
    )
    assert re.search(reason, str(job.reason))
    command = "dreamfleet submit ... -- train 'my cat.yaml' train.seed=1 --resume"
    assert job.resume == (command if resumable else None)
    assert Job("cat-1", "SUCCEEDED", metadata).reason is Job("cat-1", "STOPPED", metadata).resume is None
    assert Job("not-ours", "FAILED", {}, driver_exit_code=-9).resume is None


def test_following_reconnects_without_repeating_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
    client = FakeClient(
        ["step 1\n", "step 2\n", RuntimeError("closed")],
        [ConnectionResetError()],
        ["step 1\nstep 2\nst", "ep 3\n"],
        states=["PENDING", "RUNNING", "FAILED"],
    )
    shown: list[str] = []
    job = JobServer(client, "http://head:8265").follow("cat-1", shown.append)
    assert "".join(shown) == "step 1\nstep 2\nstep 3\n"
    assert (job.id, job.state) == ("cat-1", "FAILED")
    shown.clear()
    JobServer(FakeClient(["old\nnew\n"]), "http://head:8265").follow("cat-1", shown.append, skip=4)
    assert "".join(shown) == "new\n"


# ---------------------------------------------------------------- the address


def test_job_address() -> None:
    assert job_address(None, {}) == "http://127.0.0.1:8265"
    assert job_address(None, {"RAY_ADDRESS": "10.0.0.5:6379"}) == "http://127.0.0.1:8265"
    assert job_address(None, {"RAY_ADDRESS": "http://a:1"}) == "http://a:1"
    assert (
        job_address(None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "https://b/"})
        == "https://b"
    )
    assert job_address("http://c:8265/", {"RAY_API_SERVER_ADDRESS": "http://b:1"}) == "http://c:8265"
    for wrong in ("10.0.0.5:6379", "ray://10.0.0.5:10001"):
        with pytest.raises(ResourceError, match=r"--address http://10\.0\.0\.5:8265"):
            job_address(wrong, {})


def test_a_silent_server_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(ResourceError, match=r"Ray .*timed out"),
            jobs.job_server(address),
        ):
            pass
    with pytest.raises(ResourceError, match=r"Ray .*refused"), jobs.job_server(address):
        pass


@pytest.fixture
def web_server() -> Iterator[str]:
    """Serve an HTTP server that is not Ray; yield its URL."""

    class NotRay(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_server_that_is_not_ray_is_reported(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")  # Ray's own client would use this address instead
    with pytest.raises(ResourceError, match=f"{web_server} .*404"):
        with jobs.job_server(web_server):
            pass


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[str]:
    """Serve a job server without jobs over TLS, with a certificate of its own in `ca.pem`; yield its URL."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (
                b"[]" if self.path.startswith("/api/jobs") else b'{"version": "4", "ray_version": "2.60.0"}'
            )
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += [
        "-keyout",
        "key.pem",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=head",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tls_needs_one_variable(tls_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ResourceError, match=r"certificate .*SSL_CERT_FILE"), jobs.job_server(tls_server):
        pass
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with jobs.job_server(tls_server) as server:
        assert server.jobs() == []


# ---------------------------------------------------------------- the command line


def test_the_submitted_command_is_validated_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    recipe = str(tiny.write_recipe(tmp_path / "r.yaml", tiny.make_recipe(tmp_path)))

    def error(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["submit", *arguments])
        assert result.exit_code == 2, result.output
        return result.output

    assert "train or tune" in error("--", "score", recipe)
    assert "data tags" in error("--", "data", "tags", recipe)
    assert "No such option: --resume" in error("--", "data", "cache", recipe, "--resume")
    assert "data.cache_dir" in error("--", "data", "cache", recipe, f"data.cache_dir={tmp_path / 'cache'}")
    assert "no Ray job server" in error("--", "data", "cache", recipe, "data.cache_dir=s3://b/latents")
    assert "No such option: --resum" in error("--", "train", recipe, "--resum")
    assert "before the `--`" in error("--", "train", recipe, "--address", "auto")
    assert "nowhere.yaml" in error("--", "train", "nowhere.yaml")
    assert "'max_train_steps'" in error("--", "train", recipe, "train.max_train_step=4")
    assert "output_dir" in error("--", "train", recipe)
    assert "NOT_SET" in error("--env", "NOT_SET", "--", "train", recipe, f"output_dir={BUCKET}")
    # Only the cluster is missing. Options after the command belong to the command, also without `--`.
    assert "no Ray job server" in error("train", recipe, f"output_dir={BUCKET}", "--resume")
