"""Compares the machines of a cluster: versions, clocks, memory, GPUs, storage, bandwidth and missing ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamfleet.cluster.finding import Finding
from dreamfleet.datasets.environment import variables_to_send
from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.scaling import describe
from dreamfleet.trainers.driver.node_probe import TRANSFER_BYTES, Failed, Probes, Transfer
from dreamfleet.trainers.driver.session import Node, RaySession, ray_session

GIB = 2**30
LARGEST_SKEW, SEVERE_SKEW = 1.0, 300.0  # seconds; servers refuse S3 requests that are 15 minutes off
SLOW_LINK = 125e6  # bytes per second: 1 Gbit/s
SMALL_MEMORY = GIB  # of /dev/shm
MUST_BE_EQUAL = ("python", "ray", "torch", "dreamfleet")  # others that differ are a note

Facts = Mapping[Node, "Mapping[str, Any] | Failed"]


def examine_cluster(
    address: str | None, *, storage: str | None = None, expected: int | None = None
) -> list[Finding]:
    """Check every machine of the cluster at ``address``; ``storage``: a folder or s3:// prefix that all must reach.

    ``expected``: the number of machines beside the head that the cluster's configuration asks for; by default that of
    the configuration which `ray up` stored on the head node. Never shows a secret.
    """
    try:
        with ray_session(address) as session:
            return _examine(session, storage, expected)
    except UserError as error:
        return [Finding("cluster", "MISSING", str(error))]


def _examine(session: RaySession, storage: str | None, expected: int | None) -> list[Finding]:
    nodes, limit = session.nodes(), session.growth_limit()
    found = [Finding("cluster", "ok", f"{len(nodes)} machine{'s' * (len(nodes) != 1)}")]
    found += [Finding("machine", "ok", f"{named(node)}: {describe(node.resources)}") for node in nodes]
    if limit:
        found.append(Finding("grows to", "ok", describe(limit)))
    probes = Probes(nodes)
    try:
        facts = probes.facts()
        found += compare_numbers(facts, session.lost_nodes(), expected)
        answering = [node for node, each in facts.items() if not isinstance(each, Failed)]
        probes.nodes = answering
        found += compare_versions(facts)
        found += compare_clocks(probes.clock_offsets())
        found += compare_memory(facts) + compare_gpus(facts)
        if storage:
            sent = variables_to_send(buckets="://" in storage)
            found += compare_storage(storage, probes.storage(storage, sent))
        found += compare_links(probes.transfers(transfer_size(answering)))
    finally:
        probes.close()
    return found


def named(node: Node) -> str:
    """Return how a machine is called in findings."""
    return f"{node.address} ({node.node_id[:6]})"


def transfer_size(nodes: Sequence[Node]) -> int:
    """Return how many bytes to send between machines: at most a quarter of the smallest object store."""
    stores = [node.resources.get("object_store_memory", 0.0) for node in nodes]
    return int(min([TRANSFER_BYTES, *(store / 4 for store in stores if store)]))


def compare_numbers(facts: Facts, lost: Sequence[str], expected: int | None) -> list[Finding]:
    """Report machines that do not answer, that left, and that never joined."""
    found = [
        Finding(
            "machine", "MISSING", f"{named(node)} does not answer: {answer.reason}",
            "check its logs in /tmp/ray/session_latest/logs, and start Ray there again",
        )
        for node, answer in facts.items() if isinstance(answer, Failed)
    ]  # fmt: skip
    known = [each for each in facts.values() if not isinstance(each, Failed)]
    wanted = next((each["expected"] for each in known if each.get("expected") is not None), None)
    wanted = expected if expected is not None else wanted
    if wanted is not None and len(facts) - 1 < wanted:
        lacks_rsync = [named(n) for n, f in facts.items() if not isinstance(f, Failed) and not f["has_rsync"]]
        hint = f"; rsync is missing on {', '.join(lacks_rsync)}: install it" if lacks_rsync else ""
        found.append(
            Finding(
                "machines",
                "MISSING",
                f"{len(facts) - 1} of {wanted} workers of the cluster's configuration have joined",
                "see `ray monitor` or /tmp/ray/session_latest/logs/monitor* on the head; on your own machines start "
                f"the head with RAY_enable_autoscaler_v2=0{hint}",
            )
        )
    if lost:
        text = f"{len(lost)} have left the cluster: {', '.join(lost[:5])}"
        found.append(
            Finding("lost machines", "note", text, "start Ray there again, if they should take part")
        )
    return found


def compare_versions(facts: Facts) -> list[Finding]:
    """Report packages whose versions differ between machines."""
    found = []
    per_package: dict[str, dict[str | None, list[str]]] = {}
    for node, each in facts.items():
        if isinstance(each, Failed):
            continue
        for package, number in each["versions"].items():
            per_package.setdefault(package, {}).setdefault(number, []).append(named(node))
    for package, numbers in per_package.items():
        if len(numbers) == 1:
            continue
        listed = "; ".join(
            f"{number or 'absent'} on {', '.join(where)}"
            for number, where in sorted(numbers.items(), key=str)
        )
        # A job brings its own dreamfleet.
        more = (
            ", or start runs by `dreamfleet submit`, which brings its code" if package == "dreamfleet" else ""
        )
        remedy = f"install one version everywhere, such as with the pip options of constraints.txt{more}"
        name = f"version of {package}"
        found.append(Finding(name, "MISSING" if package in MUST_BE_EQUAL else "note", listed, remedy))
    if not found and per_package:
        shown = ", ".join(f"{p} {next(iter(n))}" for p, n in per_package.items() if next(iter(n)))
        found.append(Finding("versions", "ok", f"equal on all machines: {shown}"))
    return found


def compare_clocks(offsets: Mapping[Node, tuple[float, float] | Failed]) -> list[Finding]:
    """Report clocks that differ from this machine's by more than the measurement's uncertainty and LARGEST_SKEW."""
    found, largest = [], 0.0
    for node, offset in offsets.items():
        if isinstance(offset, Failed):
            continue
        seconds, uncertainty = offset
        largest = max(largest, abs(seconds))
        if abs(seconds) - uncertainty <= LARGEST_SKEW:
            continue
        text = f"{named(node)} is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
        if abs(seconds) > SEVERE_SKEW:
            found.append(Finding("clock", "MISSING", f"{text}: S3 and TLS refuse such clocks", _CLOCK_REMEDY))
        else:
            found.append(
                Finding("clock", "note", f"{text}: times in events and logs are wrong", _CLOCK_REMEDY)
            )
    if offsets and not found:
        found.append(Finding("clocks", "ok", f"differ by {largest * 1000:.0f} ms at most"))
    return found


_CLOCK_REMEDY = "run chrony or systemd-timesyncd on every machine (timedatectl set-ntp true)"


def compare_memory(facts: Facts) -> list[Finding]:
    """Report machines with little shared memory or disk."""
    found = []
    for node, each in facts.items():
        if isinstance(each, Failed):
            continue
        shared, disk = each["shared_memory"], each["disk"]
        if shared is None or shared["free"] < SMALL_MEMORY:
            free = "none" if shared is None else f"{shared['free'] / GIB:.2f} GiB free"
            found.append(
                Finding(
                    "/dev/shm", "note", f"{named(node)}: {free}; Ray's objects go to disk, which is slow",
                    "start containers with --shm-size=2g or more",
                )
            )  # fmt: skip
        if disk is not None and disk["free"] < 5 * GIB:
            text = f"{named(node)}: {disk['free'] / GIB:.1f} GiB free for temporary files"
            found.append(
                Finding("disk", "note", text, "free some, or start Ray with --temp-dir on a larger disk")
            )
    return found or [Finding("shared memory", "ok", "enough on every machine")]


def compare_gpus(facts: Facts) -> list[Finding]:
    """Report the GPUs of each machine, drivers that differ, and GPUs that Ray does not offer."""
    found, drivers = [], dict[str, list[str]]()
    for node, each in facts.items():
        if isinstance(each, Failed):
            continue
        gpus, offered = each["gpus"], int(node.resources.get("GPU", 0))
        if gpus:
            kinds = ", ".join(sorted({gpu["name"] for gpu in gpus}))
            found.append(
                Finding("gpus", "ok", f"{named(node)}: {len(gpus)} x {kinds}, driver {gpus[0]['driver']}")
            )
        for driver in {gpu["driver"] for gpu in gpus}:
            drivers.setdefault(driver, []).append(named(node))
        if len(gpus) != offered:
            text = f"{named(node)}: nvidia-smi lists {len(gpus)}, Ray offers {offered}"
            found.append(
                Finding("gpus", "note", text, "check the container's --gpus=all and CUDA_VISIBLE_DEVICES")
            )
    if len(drivers) > 1:
        listed = "; ".join(f"{driver} on {', '.join(where)}" for driver, where in sorted(drivers.items()))
        found.append(Finding("gpu drivers", "note", listed, "install one driver version on every machine"))
    return found


def compare_storage(url: str, results: Mapping[Node, Mapping[str, Any] | Failed]) -> list[Finding]:
    """Report machines that cannot write, read, list, remove, or write conditionally in a folder or bucket."""
    found = []
    for node, each in results.items():
        if isinstance(each, Failed):
            found.append(Finding("storage", "MISSING", f"{named(node)}: {each.reason}", _STORAGE_REMEDY))
        elif each["error"]:
            text = f"{named(node)} cannot {each['failed']}: {each['error']}"
            found.append(Finding("storage", "MISSING", text, _STORAGE_REMEDY))
        elif each["conditional"] is False:
            text = f"{named(node)}: conditional writes do not work in {url}, so two drivers could use one run folder"
            remedy = "use a server with conditional writes (AWS S3, MinIO, SeaweedFS), or start one driver at a time"
            found.append(Finding("storage", "note", text, remedy))
        else:
            times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in each["seconds"].items())
            more = ", conditional writes" if each["conditional"] else ""
            found.append(Finding("storage", "ok", f"{named(node)}: {times}{more}"))
    return found


_STORAGE_REMEDY = (
    "check keys or role (AWS_*), endpoint (AWS_ENDPOINT_URL) and network of that machine; "
    "a folder must be mounted there"
)


def compare_links(transfers: Sequence[Transfer | Failed]) -> list[Finding]:
    """Report the bandwidth of each link that was measured."""
    found = []
    for each in transfers:
        if isinstance(each, Failed):
            found.append(
                Finding("link", "MISSING", each.reason, "check the firewall: machines need all ports")
            )
            continue
        speed = each.size / each.seconds
        text = f"{named(each.source)} to {named(each.target)}: {speed * 8 / 1e9:.2f} Gbit/s"
        if speed < SLOW_LINK:
            remedy = "workers exchange gradients at every step: use one placement group or subnet, or LoRA"
            found.append(Finding("link", "note", f"{text}, slow", remedy))
        else:
            found.append(Finding("link", "ok", text))
    return found
