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

    The rate is that between two sets, so that the start of Ray's workers and of the models does not count.
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
            found["three"] = rates_on(lab, "three")
            for node in lab.nodes[1:]:
                node.power_off(farewell=True)
            wait_for_one(lab)
            found["one"] = rates_on(lab, "one")
        finally:
            for node in lab.nodes:
                node.power_off(farewell=True)
            for group in groups:
                group.remove()
    found["ratio"] = {
        name: round(found["three"][name]["per_second"] / found["one"][name]["per_second"], 2)
        for name in found["one"]
    }
    return found


def rates_on(lab: Any, name: str) -> dict[str, Any]:
    """Return seconds for both sets and the rate between them, for each command, on the living nodes."""
    from lab.laboratory import BUCKET

    commands: dict[str, list[str]] = {
        "prepare": ["OUT", "--size", "512", "--format", "jpg"],
        "caption": ["--tagger", "/tmp/shared/wd", "--out", "OUT.parquet"],
    }
    found: dict[str, Any] = {}
    for command, options in commands.items():
        seconds = []
        for count in (FEW, MANY):
            out = f"s3://{BUCKET}/out-{name}-{command}-{count}"
            words = [word.replace("OUT", out) for word in options]
            seconds.append(run_on_head(lab, ["data", command, f"s3://{BUCKET}/set-{count}", *words]))
            print(name, command, count, round(seconds[-1], 1), flush=True)
        rate = (MANY - FEW) / (seconds[1] - seconds[0])
        found[command] = {"seconds": [round(one, 1) for one in seconds], "per_second": round(rate, 2)}
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
