"""Test that Ray, KubeRay and Kueue accept the files that start clusters, and that their comments are correct."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

RAY_UP = {
    "aws": "ray_config.yaml",
    "gcp": "cluster/launch/gcp.yaml",
    "local": "cluster/launch/ssh.yaml",
    "single": "cluster/launch/single-node.yaml",
}
MANIFESTS = ("kuberay-job.yaml", "kuberay-cluster.yaml", "kueue.yaml")
CRDS = Path(__file__).parents[1] / "support" / "crds"
WORKERS = {"aws": 4, "gcp": 4, "local": 2, "single": 0}


@pytest.fixture
def configs(root: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations for `ray up` by their names in RAY_UP."""
    return {name: yaml.safe_load((root / file).read_text()) for name, file in RAY_UP.items()}


@pytest.fixture(scope="module")
def image(root: Path) -> str:
    """Return the Dockerfile, without comments."""
    lines = (root / "cluster/launch/Dockerfile").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("kind", RAY_UP)
def test_ray_accepts_the_cluster_config(configs: dict[str, dict[str, Any]], kind: str) -> None:
    # A private Ray module, but the only one that reads the file; constraints.txt pins ray.
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(configs[kind])
    validate_config(prepared)
    assert prepared["max_workers"] == WORKERS[kind]
    with pytest.raises(Exception, match="worker_number"):  # the reader rejects unknown keys
        validate_config(prepare_config({**configs[kind], "worker_number": 3}))


@pytest.mark.parametrize("kind", RAY_UP)
def test_every_machine_requires_the_token(configs: dict[str, dict[str, Any]], kind: str) -> None:
    config = configs[kind]
    starts = [config[f"{role}_start_ray_commands"] for role in ("head", "worker")]
    assert all(starts) or WORKERS[kind] == 0
    for *_, start in filter(None, starts):
        assert re.search(r"RAY_AUTH_MODE=token (\S+=\S+ )?(~/dreamfleet/bin/)?ray start", start)
    assert any(there.endswith("/.ray/auth_token") for there in config["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--autoscaling-config=" in config["head_start_ray_commands"][-1], "no worker would ever be started"


def test_the_list_of_machines_uses_the_autoscaler_that_starts_all_of_them(
    configs: dict[str, dict[str, Any]],
) -> None:
    assert "RAY_enable_autoscaler_v2=0" in configs["local"]["head_start_ray_commands"][-1]


@pytest.mark.parametrize("kind", ["aws", "local"])
def test_machines_get_the_requirements_of_dreamfleet(
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


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_only_workers_are_spot_and_disks_are_large_enough_for_weights(
    configs: dict[str, dict[str, Any]], kind: str
) -> None:
    config = configs[kind]
    for name, entry in config["available_node_types"].items():
        node = entry["node_config"]
        is_worker = name != config["head_node_type"]
        assert (("SPOT" in json.dumps(node)) or ('"spot"' in json.dumps(node))) == is_worker
        size = re.search(r'"(VolumeSize|diskSizeGb)": (\d+)', json.dumps(node))
        assert size and int(size[2]) >= 100
        if kind == "aws":
            assert ("IamInstanceProfile" in node) == is_worker, "Ray itself gives a role to the head only"


@pytest.mark.parametrize("kind", ["aws", "gcp", "single"])
def test_containers_get_shared_memory_and_gpus(configs: dict[str, dict[str, Any]], kind: str) -> None:
    docker = configs[kind]["docker"]
    common = docker["run_options"]
    head = [*common, *docker.get("head_run_options", ())]
    worker = [*common, *docker.get("worker_run_options", ())]
    for options in (head, worker):
        assert any(option.startswith("--shm-size=") for option in options)
    assert "--gpus=all" in worker


# ---------------------------------------------------------------- Kubernetes


def resources(root: Path, file: str) -> list[dict[str, Any]]:
    text = (root / "cluster" / "launch" / file).read_text()
    return [part for part in yaml.safe_load_all(text) if part]


def strict(schema: Any) -> Any:
    """Return a schema that rejects unknown fields, as a Kubernetes server with strict field validation does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    if closed and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def schema_of(kind: str) -> tuple[str, dict[str, Any]]:
    """Return API version and schema of a kind; a RayCluster is the `rayClusterSpec` of a RayJob."""
    file = "RayJob" if kind == "RayCluster" else kind
    given = json.loads((CRDS / f"{file}.json").read_text())
    schema = given["schema"]
    if kind == "RayCluster":
        spec = schema["properties"]["spec"]["properties"]["rayClusterSpec"]
        schema = {**schema, "properties": {**schema["properties"], "spec": spec}}
    found: dict[str, Any] = strict(schema)
    found["properties"]["metadata"] = {"type": "object"}  # the server checks it, not the definition
    return given["apiVersion"], found


@pytest.mark.parametrize("file", MANIFESTS)
def test_manifests_match_the_published_schemas(root: Path, file: str) -> None:
    for resource in resources(root, file):
        version, schema = schema_of(resource["kind"])
        assert resource["apiVersion"] == version
        jsonschema.Draft7Validator(schema).validate(resource)


def test_the_schemas_reject_misspelt_and_missing_fields(root: Path) -> None:
    (job,) = resources(root, "kuberay-job.yaml")
    _, schema = schema_of("RayJob")
    for change in (
        "spec.backofLimit",
        "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.imagee",
    ):
        spoilt = json.loads(json.dumps(job))
        *path, last = change.split(".")
        target: Any = spoilt
        for name in path:
            target = target[int(name) if name.isdigit() else name]
        target[last] = "x"
        with pytest.raises(jsonschema.ValidationError, match=last):
            jsonschema.Draft7Validator(schema).validate(spoilt)
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpec"):
        jsonschema.Draft7Validator(schema).validate(job)


def test_kueue_manages_the_ray_resources(root: Path) -> None:
    """Test the rules of Kueue's webhooks, which no schema holds, and the names that refer to other files."""
    kueue = resources(root, "kueue.yaml")
    names = {
        kind: {r["metadata"]["name"] for r in kueue if r["kind"] == kind}
        for kind in {r["kind"] for r in kueue}
    }
    (cluster_queue,) = [r for r in kueue if r["kind"] == "ClusterQueue"]
    covered = set(cluster_queue["spec"]["resourceGroups"][0]["coveredResources"])
    for file in ("kuberay-job.yaml", "kuberay-cluster.yaml"):
        (resource,) = resources(root, file)
        labels = resource["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] in names["LocalQueue"]
        assert labels["kueue.x-k8s.io/priority-class"] in names["WorkloadPriorityClass"]
        spec = resource["spec"].get("rayClusterSpec", resource["spec"])
        assert spec["authOptions"]["mode"] == "token"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert set(container["resources"]["requests"]) <= covered, "Kueue would not admit it"
            assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    (job,) = resources(root, "kuberay-job.yaml")
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # required by Kueue
    assert job["spec"]["entrypoint"].endswith("--resume"), "a new cluster would refuse the run of a lost one"
    (cluster,) = resources(root, "kuberay-cluster.yaml")
    assert cluster["spec"]["enableInTreeAutoscaling"]
    assert cluster["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"  # required then


# ---------------------------------------------------------------- versions


def pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines if line.count("==") == 1)


def test_the_pinned_ray_version_is_that_of_images_and_manifests(
    root: Path, configs: dict[str, dict[str, Any]], image: str
) -> None:
    ray = pins(root)["ray"]
    assert f":{ray}-" in configs["aws"]["docker"]["image"]
    assert re.findall(r"rayproject/ray:([\d.]+)-", (root / "cluster/launch/Dockerfile").read_text()) == [
        ray,
        ray,
    ]
    for file in ("kuberay-job.yaml", "kuberay-cluster.yaml"):
        (resource,) = resources(root, file)
        assert resource["spec"].get("rayClusterSpec", resource["spec"])["rayVersion"] == ray


def test_every_launch_file_uses_the_image_of_this_version(root: Path) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = {
        path.name: set(re.findall(r"REGISTRY/dreamfleet:([\w.]+)", path.read_text()))
        for path in (root / "cluster" / "launch").iterdir()
    }
    for name in ("Dockerfile", "gcp.yaml", "single-node.yaml", "kuberay-job.yaml", "kuberay-cluster.yaml"):
        assert found[name] == {version}


def test_the_image_holds_the_requirements_and_all_sources(root: Path, image: str) -> None:
    """Test the Dockerfile without Docker: every copied path exists and no ignore rule removes it."""
    copied = [line.split()[2:-1] for line in image.splitlines() if line.startswith("COPY")]
    assert copied == [["constraints.txt", "pyproject.toml"], ["."]]
    allowed = re.findall("^!(.+)$", (root / "cluster/launch/Dockerfile.dockerignore").read_text(), re.M)
    assert all((root / name).exists() for name in allowed)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    needed = {path.split("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    needed |= {
        "pyproject.toml",
        "constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    assert set(allowed) == needed
    (code,) = re.findall(r'python -c "(.+)"', image)
    code = code.replace("/tmp/build/pyproject.toml", str(root / "pyproject.toml"))
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == project["project"]["dependencies"]
