"""`ray_config.yaml` as Ray's own reader takes it, and what its comments promise."""

from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def config(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "ray_config.yaml").read_text())


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    # Private, but the only reader there is; ray is pinned in constraints.txt.
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_the_on_premise_variant_is_accepted_too(root: Path, config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (root / "ray_config.yaml").read_text().split("# Machines of your own")[1]
    lines = [line.removeprefix("# ").removeprefix("#") for line in text.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("provider:"))
    end = next(number for number, line in enumerate(lines) if line.startswith("Runs on several"))
    variant = {**config, **yaml.safe_load("\n".join(lines[start:end]))}
    for name in ("available_node_types", "head_node_type", "max_workers"):
        del variant[name]
    validate_config(prepare_config(variant))


def test_only_workers_are_spot_and_disks_hold_weights(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    for name, kind in types.items():
        spot = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (name != config["head_node_type"])
        assert kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100


def test_the_pinned_ray_is_the_image_s(root: Path, config: dict[str, Any]) -> None:
    pins = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().split() if line.count("==") == 1
    )
    assert f":{pins['ray']}-" in config["docker"]["image"]
