"""The faults: each a function of a running trial that strikes, heals what a real fault would heal, and returns."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable

from lab.trial import Driver, Trial, kill, raylet_of

Fault = Callable[[Trial], None]
SHUTDOWN_SECONDS = 10  # between SIGTERM and the end of a machine that shuts down
DRAIN_SECONDS = 30  # between the notice of a preemption and the end of the machine


def kill_worker(rank: int) -> Fault:
    """SIGKILL of the process of a rank in the middle of a step."""

    def fault(trial: Trial) -> None:
        _, pid = trial.worker(rank)
        trial.mark()
        kill(pid)

    return fault


def kill_all_workers(trial: Trial) -> None:
    """SIGKILL of every training process at once."""
    pids = [trial.worker(rank)[1] for rank in range(trial.workers)]
    trial.mark()
    for pid in pids:
        kill(pid)


def kill_starting(after: float) -> Fault:
    """SIGKILL of a training process ``after`` seconds from the moment when it appears, before its first step."""

    def fault(trial: Trial) -> None:
        pids = trial.wait_for(
            lambda: [pid for node in trial.lab.nodes for pid in node.pids("RayTrainWorker")], what="a worker"
        )
        time.sleep(after)
        trial.mark()
        assert trial.before == 0, "the run was faster than the fault"
        kill(pids[-1])

    return fault


def kill_in_save(trial: Trial) -> None:
    """SIGKILL of the process that writes a checkpoint, between two of its files."""
    with trial.hold_save() as (_, pid):
        trial.mark()
        kill(pid)


def terminate_worker(trial: Trial) -> None:
    """SIGTERM of one training process."""
    _, pid = trial.worker(1)
    trial.mark()
    kill(pid, signal.SIGTERM)


def kill_raylet(trial: Trial) -> None:
    """SIGKILL of the raylet under a worker; its machine stays on, without Ray."""
    machine, _ = trial.worker(1)
    trial.mark()
    kill(raylet_of(machine))


def power_off(trial: Trial) -> None:
    """Power failure of a worker's node, without a reset or farewell."""
    machine, _ = trial.worker(1)
    trial.mark()
    machine.power_off()


def power_off_rank_0(trial: Trial) -> None:
    """Power failure of rank 0's node."""
    machine, _ = trial.worker(0)
    trial.mark()
    machine.power_off()


def terminate_node(trial: Trial) -> None:
    """SIGTERM to every process of a worker's node, and its power failure 10 s later, as when a machine shuts down."""
    machine, _ = trial.worker(1)
    trial.mark()
    for pid in machine.pids():
        kill(pid, signal.SIGTERM)
    time.sleep(SHUTDOWN_SECONDS)
    machine.power_off(farewell=True)


def drain_node(trial: Trial) -> None:
    """Notice of a preemption (`ray drain-node`) to a worker's node, whose power fails 30 s later."""
    machine, _ = trial.worker(1)
    lab = trial.lab
    node, address = lab.living_nodes()[machine.ip], f"{lab.head.ip}:6379"
    trial.mark()
    end = time.monotonic() + DRAIN_SECONDS
    words = [
        "ray", "drain-node", "--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "spot", "--deadline-remaining-seconds", str(DRAIN_SECONDS),
    ]  # fmt: skip
    done = lab.head.run(words, lab.environment(LAB_TRACE=""))
    assert done.returncode == 0, done.stdout + done.stderr
    while time.monotonic() < end and trial.driver.code is None:
        time.sleep(0.1)
    machine.power_off()


def kill_driver(trial: Trial) -> None:
    """SIGKILL of the driver."""
    pids = trial.lab.head.pids(f"dreamfleet {trial.command[0]}")
    assert pids, "no driver"
    trial.mark()
    for pid in pids:
        kill(pid)


def kill_controller(trial: Trial) -> None:
    """SIGKILL of Ray Train's controller."""
    pids = trial.lab.head.pids("TrainController")
    assert pids, "no controller"
    trial.mark()
    for pid in pids:
        kill(pid)


def pause_worker(seconds: float) -> Fault:
    """SIGSTOP of one training process, and SIGCONT ``seconds`` later."""

    def fault(trial: Trial) -> None:
        _, pid = trial.worker(1)
        trial.mark()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        kill(pid, signal.SIGCONT)

    return fault


def hang_worker(trial: Trial) -> None:
    """SIGSTOP of one training process for ever."""
    _, pid = trial.worker(1)
    trial.mark()
    os.kill(pid, signal.SIGSTOP)


def partition(seconds: float) -> Fault:
    """Two workers' nodes that lose each other's packets; both reach the head and S3."""

    def fault(trial: Trial) -> None:
        (one, _), (other, _) = trial.worker(0), trial.worker(1)
        trial.mark()
        one.deafen(other)
        other.deafen(one)
        time.sleep(seconds)
        one.undeafen(other)
        other.undeafen(one)

    return fault


def isolate(seconds: float) -> Fault:
    """A worker's node that is cut off from everything for some seconds."""

    def fault(trial: Trial) -> None:
        machine, _ = trial.worker(1)
        trial.mark()
        machine.cut()
        time.sleep(seconds)
        machine.reconnect()

    return fault


def s3_away(seconds: float) -> Fault:
    """The S3 server refuses connections for some seconds, from a step between two saves on."""

    def fault(trial: Trial) -> None:
        trial.mark()
        trial.lab.s3.kill()
        time.sleep(seconds)
        trial.lab.s3.start()

    return fault


def s3_away_in_save(seconds: float) -> Fault:
    """The S3 server refuses connections for some seconds, from the middle of a save on."""

    def fault(trial: Trial) -> None:
        with trial.hold_save():
            trial.mark()
            trial.lab.s3.kill()
        time.sleep(seconds)
        trial.lab.s3.start()

    return fault


def s3_silent(seconds: float) -> Fault:
    """The S3 server does not answer for some seconds, from the middle of a save on: its packets are lost."""

    def fault(trial: Trial) -> None:
        with trial.hold_save():
            trial.mark()
            trial.lab.server.cut()
        time.sleep(seconds)
        trial.lab.server.reconnect()

    return fault


def four_kills(trial: Trial) -> None:
    """SIGKILL of a worker four times, each time after a new checkpoint."""
    for number in range(4):
        _, pid = trial.worker(number % 2)
        trial.mark()
        kill(pid)
        if number < 3:
            trial.wait_for(lambda: trial.trace.saved(since=trial.struck), what="a new checkpoint")


def isolate_from_cluster(seconds: float) -> Fault:
    """Rank 0's node that loses the head and the other nodes for some seconds, while it still reaches S3."""

    def fault(trial: Trial) -> None:
        machine, _ = trial.worker(0)
        others = [other for other in trial.lab.machines if other is not machine]
        trial.mark()
        for other in others:
            machine.deafen(other)
            other.deafen(machine)
        time.sleep(seconds)
        for other in others:
            machine.undeafen(other)
            other.undeafen(machine)

    return fault


def start_second(*options: str, elsewhere: bool = False) -> Fault:
    """A second `dreamfleet train` on the folder while the first trains, on the head, or ``elsewhere`` on a node."""

    def fault(trial: Trial) -> None:
        trial.mark()
        trial.lengthen_steps(5.0)  # the first must outlast the second, which starts slowly on a loaded host
        place = trial.lab.nodes[-1] if elsewhere else trial.lab.head
        shutil.copy(trial.lab.head.disk / "tmp" / "recipe-0.yaml", place.disk / "tmp" / "recipe-second.yaml")
        trial.rival = Driver(trial.lab, "/tmp/recipe-second.yaml", *options, machine=place)
        trial.rival.wait()
        trial.lengthen_steps(0.0)

    return fault


def join(trial: Trial) -> None:
    """A node that was off is switched on, and joins the cluster; ends when a worker there has taken a step."""
    node = trial.lab.nodes[-1]
    trial.mark()
    trial.lengthen_steps(3.0)  # the run must last until the node trains, which is slow on a loaded host
    trial.lab.renew(node)

    def trains() -> bool:
        return any(e["event"] == "step" and e["on"] == node.name for e in trial.trace.events())

    trial.wait_for(trains, what=f"a step on {node.name}")
    trial.lengthen_steps(0.0)
