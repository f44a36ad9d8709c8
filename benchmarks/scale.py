"""Compares the model of docs/scale.md with 1, 2, 3 and 4 workers of the laboratory, and measures its constants.

Each worker has a machine of its own; its cable is limited to a stated rate by `tc`. Measured are the bandwidth and the
latency between two machines, the seconds of a step for every number of workers and rate, the seconds of a save in the
step loop, and from a killed worker to the next new step. All machines share the processor of this host: w workers on c
cores compute w / c times as long, which the prediction takes into account. Writes results/scale.json and the tables of
docs/scale.md (`--page`: only the tables).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import RESULTS, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from lab.faults import kill_worker
from lab.laboratory import Laboratory, end_on_sigterm, why_not
from lab.machine import VENV, Machine
from lab.trial import Trial

from dreamfleet.trainers.scale.cluster import Cluster, parse_cluster
from dreamfleet.trainers.scale.communication import Sizes, exchange_traffic, step_time
from dreamfleet.trainers.scale.plan import estimate_costs
from dreamfleet.trainers.scale.recovery import best_interval, effective_share

# What two machines run to measure the way between them: seconds of a round trip, then bytes per second.
ECHO = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 7777)); link, _ = server.accept()
for _ in range(100): link.sendall(link.recv(1))
left = int(sys.argv[2])
while left: left -= len(link.recv(1 << 20))
link.sendall(b"x")
"""
ASK = """
import socket, sys, time
deadline = time.time() + 20
while True:
    try: link = socket.create_connection((sys.argv[1], 7777)); break
    except OSError:
        if time.time() > deadline: raise
        time.sleep(0.1)
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
began = time.perf_counter()
for _ in range(100): link.sendall(b"x"); link.recv(1)
trip = (time.perf_counter() - began) / 100
began = time.perf_counter(); link.sendall(b"x" * int(sys.argv[2])); link.recv(1)
print(trip, int(sys.argv[2]) / (time.perf_counter() - began))
"""


PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
# SD 1.5: parameters of the U-Net, bytes of the model in float32, operations of an image at 512 px (results/gpu.json)
UNET, MODEL, OPERATIONS = 859_520_964, 4_264_000_000, 2.47e12
LINKS = ("10Gb", "100Gb", "200Gb", "400Gb", "3200Gb")
SIZES = (8, 16, 32, 64, 128, 256, 512)


def example_table() -> str:
    """Return the efficiency of SD 1.5 on clusters of H100, for 1 and 16 images per GPU and step."""
    lines = ["images per GPU, link of a node", *(f"{gpus} GPUs" for gpus in SIZES)]
    rows = [lines, ["---"] * len(lines)]
    for images, link in itertools.product((1, 16), LINKS):
        sizes = Sizes(UNET, flops=OPERATIONS * images, images=images)
        clusters = [parse_cluster(f"{gpus}xH100@{link}") for gpus in SIZES]
        shares = [step_time(sizes, exchange_traffic(sizes, each.gpus), each).efficiency for each in clusters]
        rows.append([f"{images}, {link}", *(f"{share:.0%}" for share in shares)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def failure_table() -> str:
    """Return the effective training time of SD 1.5 by failures of a node, for survivors that continue or restart."""
    lines = ["a node fails every", *(f"{gpus} GPUs" for gpus in SIZES)]
    rows = [lines, ["---"] * len(lines)]
    for interval in ("6h", "1d", "10d", "150d"):
        cells = []
        for gpus in SIZES:
            cluster = parse_cluster(f"{gpus}xH100@400Gb,mtbf={interval}")
            costs = estimate_costs(cluster, state=12 * UNET, model=MODEL)
            often = best_interval(costs, cluster.failure_interval)
            shares = [
                effective_share(often, costs, cluster.failure_interval, regroups=regroups)
                for regroups in (cluster.nodes > 1, False)
            ]
            cells.append(" / ".join(f"{share:.2%}" if share > 0.995 else f"{share:.1%}" for share in shares))
        rows.append([interval, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def comparison_table() -> str:
    """Return predicted and measured seconds of results/scale.json; a note if there are none yet."""
    if not (RESULTS / "scale.json").exists():
        return "Not measured yet.\n"
    stored = json.loads((RESULTS / "scale.json").read_text())
    rows = ["| workers | cable, Mb/s | predicted step, s | measured, s |", "| --- | --- | --- | --- |"]
    rows.append(f"| 1 | - | - | {stored['one_worker_step_s']} |")
    for row in stored["steps"]:
        cable = f"{row['megabits']:g}" if row["megabits"] else "not limited"
        rows.append(f"| {row['workers']} | {cable} | {row['predicted_s']} | {row['measured_s']} |")
    recovery = stored["recovery"]
    note = (
        f"A save kept the step loop for {recovery['save_s']:.2f} s; after a killed worker the next new step was done "
        f"{recovery['new_step_s']} s later (`benchmarks/results/scale.json`)."
    )
    return "\n".join([*rows, "", note, ""])


def write_page() -> None:
    """Write the tables into docs/scale.md."""
    text = PAGE.read_text()
    tables = {"examples": example_table, "failures": failure_table, "compared": comparison_table}
    for name, make_table in tables.items():
        mark = f"<!-- {name}: benchmarks/scale.py -->\n"
        before, _, rest = text.partition(mark)
        text = before + mark + make_table() + rest[rest.index("<!-- end -->") :]
    PAGE.write_text(text)


def limit(machine: Machine, megabits: float | None) -> None:
    """Limit what a machine sends and receives to a rate; None removes the limit."""
    for ip, device in ((machine.own_ip, "eth0"), (machine.switch.ip, f"p-{machine.name}")):
        ip("qdisc", "del", "dev", device, "root", check=False, tool="tc")
        if megabits:
            shape = f"tbf rate {megabits}mbit burst 256k latency 200ms"
            ip("qdisc", "add", "dev", device, "root", *shape.split(), tool="tc")


def measure_link(lab: Laboratory, *, size: int) -> tuple[float, float]:
    """Return seconds of a message, and bytes per second, from one node to another."""
    one, other = lab.nodes[:2]
    env = {"PATH": os.environ["PATH"]}
    server = other.start(
        [f"{VENV}/bin/python", "-S", "-c", ECHO, other.ip, str(size)], env, log=lab.folder / "echo.log"
    )
    done = one.run([f"{VENV}/bin/python", "-S", "-c", ASK, other.ip, str(size)], env)
    server.wait(20)
    trip, rate = map(float, done.stdout.split())
    return trip / 2, rate


def measure_steps(lab: Laboratory, workers: int, steps: int) -> tuple[float, str]:
    """Return the median seconds of a step without checkpoints, and the run's address."""
    trial = Trial(lab, "scale", workers=workers, steps=steps, recipe={"train__checkpointing_steps": steps})
    try:
        assert trial.start().wait() == 0, trial.driver.lines[-15:]
    finally:
        trial.close()
    times = [step["t"] for step in trial.trace.steps()]
    return statistics.median(b - a for a, b in itertools.pairwise(times[2:])), trial.url


def measure_recovery(lab: Laboratory) -> dict[str, Any]:
    """Return the seconds from a killed worker to the next new step, and those of a save in the step loop."""
    trial = Trial(lab, "recovery")
    try:
        trial.start()
        trial.wait_for_step(trial.at)
        kill_worker(1)(trial)
        assert trial.driver.wait() == 0, trial.driver.lines[-15:]
    finally:
        trial.close()
    saves = [event for event in lab.ask("events", trial.url) if event["kind"] == "save"]
    seconds = {
        name: statistics.median([save[name] for save in saves if name in save] or [0.0])
        for name in ("seconds", "background_seconds")
    }
    return trial.measure() | {
        "save_s": seconds["seconds"],
        "save_background_s": seconds["background_seconds"],
    }


def main() -> None:
    """Measure, predict and write both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="largest number of workers")
    parser.add_argument("--rates", default="0,400,200", help="Mb/s of a cable; 0: not limited")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--page", action="store_true", help="write only the tables of docs/scale.md")
    asked = parser.parse_args()
    if asked.page:
        write_page()
        return
    if reason := why_not():
        sys.exit(reason)
    end_on_sigterm()
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    with Laboratory(asked.workers) as lab:
        alone, url = measure_steps(lab, 1, asked.steps)
        trained = lab.ask("trained_elements", url)
        sizes = Sizes(trained=trained, images=2)
        for megabits in map(float, asked.rates.split(",")):
            for node in lab.nodes:
                limit(node, megabits)
            latency, rate = measure_link(lab, size=20_000_000)
            for workers in range(2, asked.workers + 1):
                cluster = Cluster(
                    workers, per_node=1, link=rate, bus=rate, latency=latency, overlap=0.0,
                    step=alone * max(1.0, workers / cores),
                )  # fmt: skip
                predicted = step_time(sizes, exchange_traffic(sizes, workers), cluster)
                measured, _ = measure_steps(lab, workers, asked.steps)
                rows.append(
                    {
                        "megabits": megabits or None,
                        "workers": workers,
                        "link_bytes_per_s": round(rate),
                        "latency_s": round(latency, 6),
                        "predicted_s": round(predicted.seconds, 4),
                        "predicted_communication_s": round(predicted.communication, 4),
                        "measured_s": round(measured, 4),
                        "predicted_over_measured": round(predicted.seconds / measured, 3),
                    }
                )
                print(rows[-1], flush=True)
        for node in lab.nodes:
            limit(node, None)
        recovery = measure_recovery(lab)
    result = {"cores": cores, "trained": trained, "one_worker_step_s": round(alone, 4), "steps": rows}
    write_result("scale", result | {"recovery": recovery}, how="sudo .venv/bin/python benchmarks/scale.py")
    write_page()


if __name__ == "__main__":
    main()
