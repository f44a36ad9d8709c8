"""Test environment variables for other machines: which are sent or adopted, and that no secret leaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from planted import SECRETS, find_planted

from dreamfleet.datasets.environment import (
    apply_variables,
    is_secret,
    secrets_hidden,
    variable,
    variables_to_send,
)
from dreamfleet.trainers.driver.build_cache import cache_latents
from dreamfleet.trainers.driver.session import ray_session
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.tune.search import search


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that sets this process's environment to that of another machine."""
    before = dict(os.environ)

    def become(home: Path = tmp_path, **values: str) -> None:
        os.environ.clear()
        os.environ.update({"HOME": str(home), "PATH": before["PATH"], **values})

    yield become
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("AWS_ACCESS_KEY_ID", "x", True),
        ("AWS_SESSION_TOKEN", "x", True),
        ("HF_TOKEN", "x", True),
        ("HUGGING_FACE_HUB_TOKEN", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("MYSQL_PASSWORD", "x", True),
        ("https_proxy", "http://me:word@proxy:3128", True),
        ("AWS_ENDPOINT_URL_S3", "https://key:word@store.example", True),
        ("PIP_INDEX_URL", "https://token@index.example/simple", True),
        ("https_proxy", "http://proxy:3128", False),
        ("AWS_ENDPOINT_URL_S3", "https://store.example/a@b", False),
        ("AWS_DEFAULT_REGION", "x", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/token", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("PATH", "/bin", False),
        ("RAY_AUTH_TOKEN", "x", False),
    ],
)
def test_is_secret(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_hidden_secrets_are_returned_by_variable(machine: Callable[..., None]) -> None:
    machine(HF_TOKEN="hush", AWS_ACCESS_KEY_ID="id", LANG="C")
    with secrets_hidden():
        with secrets_hidden():
            assert set(os.environ) == {"HOME", "PATH", "LANG"}
        assert "HF_TOKEN" not in os.environ, "the outer block goes on"
        assert (variable("HF_TOKEN"), variable("LANG"), variable("NOTHING")) == ("hush", "C", None)
        assert variables_to_send(buckets=True)["AWS_ACCESS_KEY_ID"] == "id"
        os.environ["HF_TOKEN"] = "changed since"
    assert (os.environ["HF_TOKEN"], os.environ["AWS_ACCESS_KEY_ID"]) == ("changed since", "id")
    assert variable("AWS_ACCESS_KEY_ID") == "id"


def test_machine_specific_variables_are_not_sent(machine: Callable[..., None]) -> None:
    machine(
        AWS_ACCESS_KEY_ID="id",
        AWS_ENDPOINT_URL="http://store",
        AWS_PROFILE="mine",
        AWS_CONFIG_FILE="/here/config",
        AWS_WEB_IDENTITY_TOKEN_FILE="/here/token",
        AWS_CONTAINER_CREDENTIALS_FULL_URI="http://169.254.170.2/role",
        HTTPS_PROXY="http://localhost:8080",
        http_proxy="http://proxy:3128",
        NO_PROXY="127.0.0.1",
        HF_TOKEN="hush",
        SOMETHING_ELSE="stays",
    )
    hub = {"HF_TOKEN": "hush", "http_proxy": "http://proxy:3128", "NO_PROXY": "127.0.0.1"}
    assert variables_to_send(buckets=False) == hub
    assert variables_to_send(buckets=True) == hub | {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_ENDPOINT_URL": "http://store",
    }


def test_the_hub_token_of_a_login_is_sent(machine: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/token").write_text("hush\n")
    machine()
    assert variables_to_send(buckets=False) == {"HF_TOKEN": "hush"}
    machine(HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    assert variables_to_send(buckets=False) == {}


def write_profiles(home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = id-0\naws_secret_access_key = hush-0\n"
        "[mine]\naws_access_key_id = id-1\naws_secret_access_key = hush-1\naws_session_token = for-an-hour\n"
    )
    (home / ".aws/config").write_text(
        "[profile mine]\nregion = eu-west-1\nservices = local\n"
        "[services local]\ns3 =\n  endpoint_url = https://store.example\n"
    )


def test_keys_of_a_profile_are_sent_to_machines_without_it(
    machine: Callable[..., None], tmp_path: Path
) -> None:
    write_profiles(tmp_path)
    machine()
    assert variables_to_send(buckets=True)["AWS_ACCESS_KEY_ID"] == "id-0"
    machine(AWS_PROFILE="nowhere")
    assert variables_to_send(buckets=True) == {}, "the first use of the bucket tells it"
    machine(AWS_PROFILE="mine")
    sent = variables_to_send(buckets=True)
    assert "AWS_ACCESS_KEY_ID" not in variables_to_send(buckets=False)

    machine(
        tmp_path / "another", AWS_PROFILE="theirs", AWS_ACCESS_KEY_ID="theirs", AWS_SECURITY_TOKEN="theirs"
    )
    apply_variables(sent)
    taken = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert taken == {
        "AWS_ACCESS_KEY_ID": "id-1",
        "AWS_SECRET_ACCESS_KEY": "hush-1",
        "AWS_SESSION_TOKEN": "for-an-hour",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL_S3": "https://store.example",
    }
    machine(AWS_ACCESS_KEY_ID="theirs")
    apply_variables(sent)  # this machine has the profile, which can renew its keys
    assert os.environ["AWS_PROFILE"] == "mine" and "AWS_ACCESS_KEY_ID" not in os.environ


def test_the_endpoint_variable_has_priority_over_the_profile(
    machine: Callable[..., None], tmp_path: Path
) -> None:
    write_profiles(tmp_path)
    machine(AWS_PROFILE="mine", AWS_ENDPOINT_URL="http://store")
    sent = variables_to_send(buckets=True)
    assert sent["AWS_ENDPOINT_URL"] == "http://store" and "AWS_ENDPOINT_URL_S3" not in sent


def test_variables_set_on_a_machine_are_kept(machine: Callable[..., None], tmp_path: Path) -> None:
    sent = {
        "HF_TOKEN": "sent",
        "HF_ENDPOINT": "http://mirror",
        "HF_HOME": str(tmp_path / "absent"),
        "SSL_CERT_FILE": str(tmp_path),
        "HTTPS_PROXY": "http://sent",
        "NO_PROXY": "sent",
        "AWS_CA_BUNDLE": str(tmp_path / "absent"),
    }
    machine(HF_TOKEN="own", http_proxy="http://own")
    apply_variables(sent)
    own = {name: value for name, value in os.environ.items() if name not in ("HOME", "PATH")}
    assert own == {
        "HF_TOKEN": "own",
        "http_proxy": "http://own",
        "HF_ENDPOINT": "http://mirror",
        "SSL_CERT_FILE": str(tmp_path),
    }
    machine()
    apply_variables(sent)
    assert os.environ["HTTPS_PROXY"] == "http://sent" and os.environ["HF_TOKEN"] == "sent"


# ---- files and processes of commands -----------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_no_command_that_uses_ray_leaks_a_secret(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test a run, a search and a cache on a private Ray: no file or process of Ray holds a secret."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    temporary, home = tmp_path_factory.mktemp("t"), tmp_path_factory.mktemp("h")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))  # Ray Tune and Ray Train store their files here
    tiny.make_images(tmp_path / "holdout", 2, seed=5)
    options: dict[str, Any] = {
        "method": {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
        "data__instance_prompt": None,
        "data__class_prompt": None,
        "data__cache_dir": None,
        "train__max_train_steps": 2,
        "validation": {"holdout": str(tmp_path / "holdout"), "holdout_timesteps": 1, "steps": 1},
        "scaling": {"num_workers": 1, "use_gpu": False},
    }
    rates = {"optimizer.learning_rate": {"distribution": "choice", "values": [1e-3, 1e-2]}}
    run, searched = tmp_path / "run", tmp_path / "searched"
    looks: list[list[str]] = []
    with ray_session(preload=("ray.tune", "ray.train.torch")) as session:
        assert session.log_folder is not None
        ray_files = Path(session.log_folder).parent
        kept = (ray_files, tmp_path, temporary)

        def look(message: Any) -> None:
            looks.append(find_planted(*kept))

        fit(build_recipe(tiny.make_recipe(tmp_path, **options, output_dir=str(run))), on_progress=look)
        tree = tiny.make_recipe(tmp_path, **options, output_dir=str(searched))
        tree["search"] = {"algorithm": "grid", "space": rates, "max_concurrent_trials": 2}
        assert [trial.status for trial in search(build_recipe(tree), on_progress=look).trials]
        cached = {**options, "data__cache_dir": str(tmp_path / "cache")}
        cache_latents(
            build_recipe(tiny.make_recipe(tmp_path, **cached, output_dir=str(tmp_path / "none"))),
            progress=lambda done, total: look(done),
        )
        looks.append(find_planted(*kept))
        agents = [file.name for file in ray_files.rglob("runtime_env_agent*")]
        assert agents, "the log that held the keys is looked at"
    assert not list(temporary.glob("dreamfleet-*")) and not (home / "ray_results").exists(), (
        "Tune's and Train's files are left"
    )
    assert len(looks) > 5 and not {file for found in looks for file in found}
    assert all(os.environ[name] == value for name, value in SECRETS.items())
