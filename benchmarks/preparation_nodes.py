"""Measures `data prepare` and `data caption` on three nodes against one, with images in a bucket. Needs root.

    python benchmarks/preparation_nodes.py --share 0.25

The nodes are namespaces of one machine (tests/support/lab). If it has fewer cores than nodes, ``--share`` limits every
node to a part of a core, as nodes of a cluster do not share their cores; the result states it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preparation import make_images, store

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
CGROUPS = Path("/sys/fs/cgroup/cpu")  # version 1
PERIOD = 100_000  # microseconds
FEW, MANY = 40, 200  # images of the two sets whose difference is a rate without start-up


def main() -> None:
    """Measure, and add the figures to the result of preparation.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--share", type=float, default=0.25, help="share of a core for each node; 0: no limit"
    )
    share = parser.parse_args().share
    store("nodes", measure_nodes(share), f"python benchmarks/preparation_nodes.py --share {share:g}")


def measure_nodes(share: float) -> dict[str, Any]:
    """Return images per second of `prepare` and `caption` on three nodes and on one, with images in a bucket.

    The rate is that between two sets, so that the start of Ray's workers and of the models does not count; see compare.
    """
    sys.path.insert(0, str(SUPPORT))
    from lab.laboratory import BUCKET, Laboratory, end_on_sigterm, why_not
    from tiny_tagger import write_tagger

    if reason := why_not():
        sys.exit(reason)
    end_on_sigterm()
    found: dict[str, Any] = {"images": [FEW, MANY], "size": "1024x768 JPEG", "cores_per_node": share or None}
    with Laboratory(nodes=3) as lab:
        shared = lab.folder / "shared"
        write_tagger(shared / "wd")
        for count in (FEW, MANY):
            make_images(shared / f"set-{count}", count, (1024, 768))
            lab.ask("upload", str(Path("/tmp/shared") / f"set-{count}"), f"s3://{BUCKET}/set-{count}")
        groups = [Share(node, share) for node in lab.nodes] if share else []
        try:
            seconds_on(lab, "first")  # reads every library from the disk once
            found["three"] = seconds_on(lab, "three")
            for node in lab.nodes[1:]:
                node.power_off(farewell=True)
            wait_for_one(lab)
            found["one"] = seconds_on(lab, "one")
        finally:
            for node in lab.nodes:
                node.power_off(farewell=True)
            for group in groups:
                group.remove()
    return {**found, **compare(found["three"], found["one"])}


def compare(three: Mapping[str, Sequence[float]], one: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the rates of both clusters for each command, from the seconds for both sets, and how they compare.

    ``whole``: the seconds of the larger set, start-up included, on one node over those on three. ``rates``: images per
    second between the two sets, without start-up; None where the larger set took no longer.
    """
    rates = {
        name: [
            round((MANY - FEW) / (later - first), 2) if later > first else None
            for first, later in (three[name], one[name])
        ]
        for name in one
    }
    return {
        "whole": {name: round(one[name][1] / three[name][1], 2) for name in one},
        "rates_three_one": rates,
        "ratio": {name: round(a / b, 2) if a and b else None for name, (a, b) in rates.items()},
    }


def seconds_on(lab: Any, name: str) -> dict[str, list[float]]:
    """Return the seconds for both sets, for each command, on the living nodes."""
    from lab.laboratory import BUCKET

    commands: dict[str, list[str]] = {
        "prepare": ["OUT", "--size", "512", "--format", "jpg"],
        "caption": ["--tagger", "/tmp/shared/wd", "--out", "OUT.parquet"],
    }
    found: dict[str, list[float]] = {}
    for command, options in commands.items():
        seconds: list[float] = []
        for count in (FEW, MANY):
            out = f"s3://{BUCKET}/out-{name}-{command}-{count}"
            words = [word.replace("OUT", out) for word in options]
            seconds.append(run_on_head(lab, ["data", command, f"s3://{BUCKET}/set-{count}", *words]))
            print(name, command, count, round(seconds[-1], 1), flush=True)
        found[command] = [round(one, 1) for one in seconds]
    return found


def run_on_head(lab: Any, words: list[str]) -> float:
    """Run a command on the head of the cluster; return its seconds."""
    from lab.laboratory import RAY_PORT

    words = ["dreamfleet", *words, "--address", f"{lab.head.ip}:{RAY_PORT}", "--json"]
    began = time.monotonic()
    done = lab.head.run(words, lab.environment(), timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-3000:]}")
    return time.monotonic() - began


def wait_for_one(lab: Any) -> None:
    """Wait until the head has noticed that a single node is left."""
    while len(lab.living_nodes()) > 2:  # the head and the node
        time.sleep(0.5)


class Share:
    """Limits a machine's processes, and those that they start, to a share of a core (control groups, version 1)."""

    def __init__(self, machine: Any, share: float) -> None:
        self.folder = CGROUPS / f"dreamfleet-{os.getpid()}-{machine.name}"
        self.folder.mkdir()
        (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD))
        (self.folder / "cpu.cfs_quota_us").write_text(str(int(share * PERIOD)))
        for pid in machine.pids():
            (self.folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Remove the limit; its processes have ended."""
        while (self.folder / "cgroup.procs").read_text().split():
            time.sleep(0.1)
        self.folder.rmdir()


if __name__ == "__main__":
    main()
