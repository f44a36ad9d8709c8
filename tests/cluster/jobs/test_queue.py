"""Test the decisions of the queue of runs, its folder, and the command line of `submit --many`, without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamfleet.cluster.cli.many import (
    QUEUE_ENDED,
    default_queue,
    entry_id,
    pack_many,
    parse_many,
    read_queues,
    stop_queued,
)
from dreamfleet.cluster.jobs.job import Job
from dreamfleet.cluster.jobs.queue import (
    MAX_CRASHES,
    STATUS,
    Entry,
    add,
    describe,
    next_entry,
    settle,
    victims,
)
from dreamfleet.cluster.jobs.queue_folder import QueueFolder
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage


def entry(name: str, **changes: Any) -> Entry:
    return Entry(
        **{"id": name, "output_dir": f"s3://b/{name}", "package": "p", "code": "c", "order": 0.0, **changes}
    )


def job(state: str, **changes: Any) -> Job:
    return Job("cat-1", state, {}, **changes)


# ---------------------------------------------------------------- which run is next


def test_the_highest_priority_starts_first_and_then_the_oldest() -> None:
    entries = [entry("a", order=2.0), entry("b", order=1.0), entry("c", order=3.0, priority=1)]
    assert next_entry(entries) == entries[2]
    assert next_entry(entries[:2]) == entries[1]
    assert next_entry([entry("d", state="RUNNING"), entry("e", state="FAILED")]) is None


def test_a_batch_never_runs_more_than_its_limit() -> None:
    running = entry("a", batch="x", max_running=1, state="RUNNING")
    waiting = entry("b", batch="x", max_running=1, priority=9)
    other = entry("c", batch="y")
    assert next_entry([running, waiting]) is None
    assert next_entry([running, waiting, other]) == other, "another batch is not held up"
    assert next_entry([replace(running, state="PREEMPTING"), waiting]) is None, "it still holds its workers"
    assert next_entry([replace(running, state="SUCCEEDED"), waiting]) == waiting


# ---------------------------------------------------------------- which run makes room


def test_the_lowest_and_newest_runs_make_room_and_no_more_than_needed() -> None:
    running = [
        (entry("low-old", priority=1, order=1.0, state="RUNNING"), {"GPU": 2.0}),
        (entry("low-new", priority=1, order=2.0, state="RUNNING"), {"GPU": 2.0}),
        (entry("lowest", priority=0, order=0.5, state="RUNNING"), {"GPU": 1.0}),
        (entry("equal", priority=5, order=3.0, state="RUNNING"), {"GPU": 4.0}),
    ]
    wanted = entry("wanted", priority=5)

    def names(gpus: float, free: float = 0.0) -> list[str]:
        return [one.id for one in victims(wanted, {"GPU": gpus}, {"GPU": free}, running)]

    assert names(1) == ["lowest"]
    assert names(3) == ["lowest", "low-new"]
    assert names(5) == ["lowest", "low-new", "low-old"]
    assert names(3, free=2) == ["lowest"]
    assert names(6) == [], "runs of equal priority stay, so stopping the others would be in vain"
    assert names(2, free=2) == [], "it fits already; Ray has not placed it yet"


def test_only_one_preemption_at_a_time_and_runs_without_workers_give_no_room() -> None:
    saving = (entry("a", state="PREEMPTING"), {"GPU": 1.0})
    running = (entry("b", state="RUNNING"), {"GPU": 1.0})
    wanted = entry("w", priority=1)
    assert victims(wanted, {"GPU": 1.0}, {}, [saving, running]) == []
    unplaced = (entry("c", state="RUNNING", order=9.0), dict[str, float]())
    assert [one.id for one in victims(wanted, {"GPU": 1.0}, {}, [unplaced, running])] == ["c", "b"], (
        "it would take the room that b leaves"
    )


# ---------------------------------------------------------------- what became of a run


@pytest.mark.parametrize(
    ("before", "found", "after"),
    [
        ("RUNNING", job("RUNNING"), "RUNNING"),
        ("RUNNING", job("SUCCEEDED", driver_exit_code=0), "SUCCEEDED"),
        ("RUNNING", job("FAILED", driver_exit_code=1), "FAILED"),
        ("RUNNING", job("FAILED", driver_exit_code=2), "FAILED"),
        ("RUNNING", job("FAILED", driver_exit_code=130), "WAITING"),  # saved, because its node was taken away
        ("RUNNING", job("FAILED", driver_exit_code=-9), "WAITING"),
        ("RUNNING", job("FAILED", driver_exit_code=137), "WAITING"),
        ("RUNNING", job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED"), "WAITING"),
        ("RUNNING", job("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE"), "FAILED"),
        ("RUNNING", job("STOPPED"), "STOPPED"),  # by the user
        ("PREEMPTING", job("RUNNING"), "PREEMPTING"),
        ("PREEMPTING", job("STOPPED"), "WAITING"),
        ("PREEMPTING", job("SUCCEEDED"), "SUCCEEDED"),
        ("RUNNING", None, "WAITING"),  # the cluster was restarted
        ("WAITING", None, "WAITING"),
        ("STOPPED", None, "STOPPED"),
    ],
)
def test_states_follow_the_jobs(before: Any, found: Job | None, after: str) -> None:
    assert settle(entry("a", state=before, starts=1), found).state == after


def test_a_run_that_crashes_again_and_again_fails_with_the_reason() -> None:
    now = entry("a", state="RUNNING")
    for _ in range(MAX_CRASHES - 1):
        now = replace(settle(now, job("FAILED", driver_exit_code=-9)), state="RUNNING")
    now = settle(now, job("FAILED", driver_exit_code=-9))
    assert now.state == "FAILED" and "SIGKILL" in now.reason


def test_submitting_again_changes_priority_continues_and_refuses_other_settings() -> None:
    new = entry("a", order=9.0, priority=3)
    assert add(new, None) == new
    waiting = add(new, entry("a", order=1.0))
    assert waiting is not None and (waiting.order, waiting.priority) == (1.0, 3), "it keeps its place"
    running = add(new, entry("a", order=1.0, state="RUNNING", starts=2))
    assert running is not None and (running.state, running.starts, running.priority) == ("RUNNING", 2, 3)
    ended = add(new, entry("a", order=1.0, state="FAILED", starts=2, crashes=3))
    assert ended is not None and (ended.state, ended.starts, ended.crashes, ended.order) == (
        "WAITING",
        2,
        0,
        9.0,
    )
    assert add(replace(new, package="other"), entry("a", state="RUNNING")) is None


# ---------------------------------------------------------------- folder and command line


def test_the_folder_holds_all_state(tmp_path: Path) -> None:
    first = QueueFolder(Storage(str(tmp_path)))
    given = entry(
        "a", options=("--shared", "/x"), variables=(("A", "1"),), max_running=2, code=first.add_code()
    )
    first.add_package(given, b"zip")
    first.write(given)
    second = QueueFolder(Storage(str(tmp_path)))
    assert second.entries() == [given]
    (tmp_path / "out").mkdir()
    package, code = second.unpack(given, tmp_path / "out")
    assert package.read_bytes() == b"zip"
    assert [path.name.partition("-")[0] for path in code] == ["dreamfleet", "dreamfleet"]
    assert (code[-1] / "cluster/jobs/queue.py").exists() or (code[0] / "cluster/jobs/queue.py").exists()
    assert first.add_code() == given.code
    second.cancel("a")
    assert first.cancelled() == {"a"}
    first.forget_cancel("a")
    assert second.cancelled() == set()


def test_recipes_options_and_overrides_are_parsed_in_any_order() -> None:
    many = parse_many(["a.yaml", "--priority", "3", "b.yaml", "train.seed=1", "--max-running", "2"])
    assert (many.recipes, many.overrides) == (["a.yaml", "b.yaml"], ["train.seed=1"])
    assert (many.priority, many.max_running, many.queue) == (3, 2, None)
    for wrong, named in (
        (["--priority", "high", "a.yaml"], "priority"),
        (["a.yaml", "--prioritty", "1"], "prioritty"),
        (["train.seed=1"], "at least one recipe"),
        (["a.yaml", "--max-running", "0"], "max-running"),
    ):
        with pytest.raises(RecipeError, match=named):
            parse_many(wrong)


def test_each_run_of_a_queue_has_its_own_folder_and_a_lasting_id(tmp_path: Path) -> None:
    def write(name: str, output_dir: str, **changes: Any) -> str:
        changes = {"output_dir": output_dir, "scaling__num_workers": 1, **changes}
        return str(tiny.write_recipe(tmp_path / name, tiny.make_recipe(tmp_path, **changes)))

    known: dict[str, Any] = {"shared": (), "variables": {}, "check": lambda recipe: None}
    paths = [write("a.yaml", "s3://b/runs/a"), write("b.yaml", "s3://b/runs/b")]
    packages, folder = pack_many(parse_many([*paths, "--priority", "2"]), **known)
    assert folder == "s3://b/runs/queue" == default_queue("s3://b/runs/a/")
    assert [one.priority for one in packages] == [2, 2]
    assert [one.id for one in packages] == [entry_id("a", "s3://b/runs/a"), entry_id("b", "s3://b/runs/b")]
    again, _ = pack_many(parse_many(paths), **known)
    assert [one.package for one in again] == [one.package for one in packages]
    changed, _ = pack_many(parse_many([*paths, "train.seed=9"]), **known)
    assert not {one.package for one in changed} & {one.package for one in packages}
    with pytest.raises(RecipeError, match="write to one output_dir, s3://b/runs/a"):
        pack_many(parse_many([paths[0], write("c.yaml", "s3://b/runs/a")]), **known)
    with pytest.raises(RecipeError, match=r"scaling\.num_workers is 0"):
        pack_many(parse_many([write("d.yaml", "s3://b/d", scaling__num_workers=0)]), **known)


class FakeServer:
    """A cluster with a queue's job and its log; a request to cancel is answered by the next state of the log."""

    def __init__(self, *states: list[dict[str, Any]], state: str = "RUNNING"):
        self.states, self.state, self.cancelled = list(states), state, 0

    def jobs(self) -> list[Job]:
        return [Job("queue-1", self.state, {"queue": "s3://b/queue"}), Job("cat-1", "RUNNING", {})]

    def logs(self, job_id: str) -> str:
        return f"starting\n{STATUS}[]\n{STATUS}{json.dumps(self.states[0])}\nmore\n"

    def submit(self, entrypoint: str, **given: Any) -> None:
        assert entrypoint.endswith("queue cancel s3://b/queue a")
        self.cancelled += 1
        self.states.pop(0)


def test_a_waiting_run_is_listed_and_stopped_by_its_queue() -> None:
    waiting, stopped = (describe(entry("a", state=state)) for state in ("WAITING", "STOPPED"))
    server = FakeServer([waiting], [stopped])
    assert read_queues(server, server.jobs()) == {"s3://b/queue": [waiting]}
    assert stop_queued(server, "unknown") is None
    assert stop_queued(server, "a") == "STOPPED"
    assert server.cancelled == 1


def test_a_queue_that_has_ended_says_so() -> None:
    server = FakeServer([describe(entry("a"))], state="FAILED")
    ((found,),) = read_queues(server, server.jobs()).values()
    assert found["reason"] == QUEUE_ENDED
    with pytest.raises(UserError, match="does not run now"):
        stop_queued(server, "a")
    running = FakeServer([describe(entry("a", state="RUNNING", starts=2))], state="FAILED")
    with pytest.raises(UserError, match="dreamfleet stop a-2"):
        stop_queued(running, "a")
