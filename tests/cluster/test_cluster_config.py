"""Test that Ray accepts `ray_config.yaml` for AWS and local machines, and that its comments are correct."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

KINDS = ("aws", "local")


@pytest.fixture
def configs(root: Path) -> dict[str, dict[str, Any]]:
    """Return the active configuration and the commented-out one at the end, keyed by provider type."""
    text = (root / "ray_config.yaml").read_text()
    commented = text[text.index("\n#\n# cluster_name:") :].splitlines()
    uncommented = "\n".join(re.sub("^# ?", "", line) for line in commented)
    found = [yaml.safe_load(text), yaml.safe_load(uncommented)]
    return {config["provider"]["type"]: config for config in found}


@pytest.mark.parametrize("kind", KINDS)
def test_ray_accepts_the_cluster_config(configs: dict[str, dict[str, Any]], kind: str) -> None:
    # A private Ray module, but the only one that reads the file; constraints.txt pins ray.
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(configs[kind])
    validate_config(prepared)
    assert prepared["max_workers"] == {"aws": 4, "local": 2}[kind]
    with pytest.raises(Exception, match="worker_number"):  # the reader rejects unknown keys
        validate_config(prepare_config({**configs[kind], "worker_number": 3}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_machine_requires_the_token(configs: dict[str, dict[str, Any]], kind: str) -> None:
    config = configs[kind]
    for role in ("head", "worker"):
        *_, start = config[f"{role}_start_ray_commands"]
        assert "RAY_AUTH_MODE=token ray start" in start
    assert any(there.endswith("/.ray/auth_token") for there in config["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--autoscaling-config=" in config["head_start_ray_commands"][-1], "no worker would ever be started"


@pytest.mark.parametrize("kind", KINDS)
def test_machines_get_what_dreamfleet_needs(
    root: Path, configs: dict[str, dict[str, Any]], kind: str
) -> None:
    installed = " ".join(configs[kind]["setup_commands"])
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=]", name)[0] for name in project["dependencies"]}
    if kind == "aws":
        needed.remove("ray")  # installed in the Docker image
    missing = {name for name in needed if not re.search(rf"[\s']{name}\b", installed)}
    assert not missing
    there, here = next(item for item in configs[kind]["file_mounts"].items() if "constraints" in item[0])
    assert (root / here).exists()
    assert installed.count(f"-c ~/{Path(there).name}") == 2


def test_only_workers_are_spot_and_disks_hold_weights(configs: dict[str, dict[str, Any]]) -> None:
    config = configs["aws"]
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (name != config["head_node_type"])
        assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100
        assert ("IamInstanceProfile" in node) == spot, "Ray itself gives a role to the head only"


def test_containers_get_shared_memory_and_gpus(configs: dict[str, dict[str, Any]]) -> None:
    docker = configs["aws"]["docker"]
    for options in (docker["head_run_options"], docker["worker_run_options"]):
        assert any(option.startswith("--shm-size=") for option in options)
    assert "--gpus=all" in docker["worker_run_options"]


def test_the_pinned_ray_version_is_that_of_the_image(root: Path, configs: dict[str, dict[str, Any]]) -> None:
    pins = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().split() if line.count("==") == 1
    )
    assert f":{pins['ray']}-" in configs["aws"]["docker"]["image"]
