"""Tests of leases and fences: one owner of a folder, also across machines, and writers that were replaced."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import S3Server, s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import CheckpointError, LeaseLost, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run import ownership
from dreamfleet.trainers.run.claim import Held, describe_holder
from dreamfleet.trainers.run.fence import Fence, begin_attempt
from dreamfleet.trainers.run.lease import (
    JOB_VARIABLE,
    LEASE_FILE,
    RENEW_SECONDS,
    Attempt,
    Holder,
    Lease,
    LeaseFile,
    SystemTime,
    as_text,
    is_superseded,
    this_process,
)
from dreamfleet.trainers.run.ownership import hold

ELSEWHERE = Holder("ann", "node-3", 4242, machine="another boot", job="cat-1a2b3c")


class FakeTime(SystemTime):
    """Clocks that only `sleep` moves; `on_sleep` is called each time, as the rest of the world."""

    def __init__(self, on_sleep: Callable[[float], None] = lambda now: None):
        self.seconds, self.on_sleep = 1_000_000.0, on_sleep

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds - 999_000

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.on_sleep(self.seconds)


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "run")
    server: S3Server = request.getfixturevalue("s3_server")
    server.set_environment(monkeypatch)
    return Storage(server.new_folder())


def put_lease(folder: Storage, holder: Holder = ELSEWHERE, *, renewed: float, **others: Any) -> None:
    lease = Lease(owner="theirs", holder=holder, since=as_text(renewed), renewed=as_text(renewed), **others)
    LeaseFile(folder).update(lambda _: lease)


def test_a_second_owner_is_refused_with_who_holds_it_and_what_to_do(folder: Storage) -> None:
    with hold(folder) as lease:
        assert describe_holder(folder) is not None
        with (
            pytest.raises(Held, match=rf"pid {os.getpid()}.*since .* UTC.*last renewed.*--take-over"),
            hold(folder),
        ):
            pass
        lease.check()
    assert describe_holder(folder) is None
    with hold(folder):
        pass


def test_of_many_at_once_one_gets_the_folder(folder: Storage) -> None:
    outcomes: list[str] = []
    start, end = threading.Barrier(5), threading.Barrier(5)

    def claim() -> None:
        start.wait()
        try:
            with hold(Storage(folder)):
                outcomes.append("held")
                end.wait(60)
        except Held:
            outcomes.append("refused")
            end.wait(60)

    threads = [threading.Thread(target=claim) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["refused"] * 4]


def test_an_owner_on_another_machine_that_renews_is_refused_soon(folder: Storage) -> None:
    clock = FakeTime()
    put_lease(folder, renewed=clock.now() - 5)
    renewals = itertools.count(clock.now() + RENEW_SECONDS, RENEW_SECONDS)
    due = [next(renewals)]

    def renew(now: float) -> None:
        if now >= due[0]:
            due[0] = next(renewals)
            LeaseFile(folder).update(lambda lease: replace(lease, renewed=as_text(now)))

    clock.on_sleep, said = renew, []
    with pytest.raises(Held, match=r"ann@node-3 \(pid 4242, job cat-1a2b3c\).*dreamfleet stop cat-1a2b3c"):
        with hold(folder, clock=clock, say=said.append):
            pass
    assert clock.now() - 1_000_000 <= 2 * RENEW_SECONDS
    assert len(said) == 1 and "waiting up to 55 s" in said[0]


@pytest.mark.parametrize(("age", "waits"), [(5, 55), (3600, 15), (-7200, 60)])
def test_a_lease_that_is_not_renewed_expires_whatever_the_clocks_say(
    tmp_path: Path, age: float, waits: float
) -> None:
    clock, said = FakeTime(), []
    folder = Storage(tmp_path)
    put_lease(folder, renewed=clock.now() - age, attempts=(Attempt(1, 0), Attempt(2, 50)))
    with hold(folder, clock=clock, say=said.append) as lease:
        assert clock.now() - 1_000_000 == pytest.approx(waits, abs=1)
        assert begin_attempt(folder, lease.owner, step=60).attempt == 3, "attempts continue"
    assert "taking over" in said[-1] and "not renewed" in said[-1]


def test_a_dead_holder_on_this_machine_is_replaced_at_once(folder: Storage) -> None:
    code = "import sys; from dreamfleet.trainers.run.ownership import hold\n"
    code += "from dreamfleet.datasets.storage.storage import Storage\n"
    code += "with hold(Storage(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, folder.path()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"pid {other.pid}"), hold(folder):
        pass
    other.kill()
    other.communicate()
    said: list[str] = []
    clock = FakeTime(lambda now: pytest.fail("waited"))
    clock.seconds = time.time()
    with hold(folder, say=said.append, clock=clock):
        pass
    assert "its process has ended" in said[0]


def test_a_process_with_the_id_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    me = this_process()
    put_lease(Storage(tmp_path), replace(me, started=me.started - 1), renewed=time.time())
    assert describe_holder(Storage(tmp_path)) is None
    put_lease(Storage(tmp_path), me, renewed=time.time())
    assert describe_holder(Storage(tmp_path)) is not None


def test_a_restarted_driver_of_the_same_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime(lambda now: pytest.fail("waited"))
    put_lease(Storage(tmp_path), renewed=clock.now())
    monkeypatch.setenv(JOB_VARIABLE, "cat-1a2b3c")
    with hold(Storage(tmp_path), clock=clock) as lease:
        assert lease.lease.holder is not None and lease.lease.holder.job == "cat-1a2b3c"


def test_a_takeover_stops_the_old_owner_at_its_next_write(folder: Storage) -> None:
    said: list[str] = []
    with hold(folder, say=said.append) as old:
        fence = begin_attempt(folder, old.owner, step=0)
        run = fence.guarded()
        run.write_text("recipe.yaml", "old")
        with hold(folder, take_over=True, say=said.append) as new:
            for write in (
                lambda: run.write_text("recipe.yaml", "late"),
                lambda: fence.begin(step=3),
                lambda: begin_attempt(folder, old.owner, step=3),
                old.check,
            ):
                with pytest.raises(LeaseLost, match="was taken over by"):
                    write()
            old.renew()
            assert old.is_lost and not new.is_lost
            begin_attempt(folder, new.owner, step=0)
        lease = LeaseFile(folder).read()
    assert folder.read_text("recipe.yaml") == "old"
    assert LeaseFile(folder).read() == lease, "the old owner releases nothing"
    assert [attempt.number for attempt in lease.attempts] == [1, 2]


def test_an_owner_waits_for_another_one_with_wait(tmp_path: Path) -> None:
    asked: list[int] = []

    def release(now: float) -> None:
        if len(asked) == 3:
            LeaseFile(Storage(tmp_path)).update(lambda lease: replace(lease, released=as_text(now)))

    clock = FakeTime(release)
    clock.seconds = time.time()
    put_lease(Storage(tmp_path), this_process(), renewed=clock.now())
    with hold(Storage(tmp_path), clock=clock, wait=lambda: asked.append(1)):
        assert len(asked) == 3


def test_an_outage_does_not_lose_a_lease_that_nobody_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeTime()
    with hold(Storage(tmp_path), clock=clock) as lease:
        with monkeypatch.context() as patch:

            def fail(*arguments: Any) -> None:
                raise StorageError("no answer")

            patch.setattr(Storage, "read_version", fail)
            for _ in range(20):
                clock.seconds += RENEW_SECONDS
                lease.renew()
        assert len([record for record in caplog.records if "not renewed" in record.message]) == 4
        lease.renew()
        assert not lease.is_lost
        (tmp_path / LEASE_FILE).unlink()  # by somebody who cleans up
        lease.check()
        lease.renew()
        assert LeaseFile(Storage(tmp_path)).read().owner == lease.owner.id


def test_a_command_does_not_wait_for_a_storage_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(ownership, "RELEASE_SECONDS", 0.01)
    monkeypatch.setattr(ownership.Ownership, "release", lambda self: answers.wait())
    with hold(Storage(tmp_path)):
        pass
    assert not answers.is_set() and "is not released" in caplog.text
    answers.set()


def test_a_start_that_failed_leaves_nothing(folder: Storage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), hold(folder, is_left_over=lambda _: True):
        raise ValueError("bad")
    assert not folder.exists()
    assert not (tmp_path / "run").exists()


def test_a_damaged_lease_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="remove it"), hold(Storage(tmp_path)):
        pass


def test_an_older_attempt_may_not_write(folder: Storage) -> None:
    first = begin_attempt(folder, None, step=0)
    first.guarded().write_text("a", "1")
    second = begin_attempt(folder, None, step=20)
    with pytest.raises(LeaseLost, match=r"attempt 1 .* replaced by attempt 2, which began at step 20"):
        first.guarded().write_text("a", "late")
    second.check()
    assert second.begin(step=25) == 3, "a rank that takes over begins another attempt"
    second.check()
    assert folder.read_text("a") == "1"


def test_checks_before_log_lines_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    fence = begin_attempt(Storage(tmp_path), None, step=0, clock=clock)
    reads: list[str] = []
    read = Storage.read_version
    monkeypatch.setattr(Storage, "read_version", lambda self, rel: (reads.append(rel), read(self, rel))[1])
    for _ in range(100):
        clock.seconds += 0.05
        fence.guarded().append_text("metrics.jsonl", "{}\n")
    assert 4 <= len(reads) <= 6
    fence.guarded().write_text("summary.json", "{}")
    assert 5 <= len(reads) <= 7


def test_runs_below_an_owned_folder_have_attempts_of_their_own(folder: Storage) -> None:
    with hold(folder) as lease:
        trials = [begin_attempt(folder.child(f"trials/{name}"), lease.owner, step=0) for name in "ab"]
        again = begin_attempt(folder.child("trials/a"), lease.owner, step=5)
        with pytest.raises(LeaseLost):
            trials[0].check()
        trials[1].check()
        with pytest.raises(Held, match=r"is part of .*, which is in use by"), hold(folder.child("trials/a")):
            pass
        with hold(folder, take_over=True) as other:
            for fence in (trials[1], again):
                with pytest.raises(LeaseLost, match="taken over"):
                    fence.check()
            begin_attempt(folder.child("trials/a"), other.owner, step=7).check()


def test_storage_without_conditional_writes_is_reported_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "supports_conditions", lambda folder: False)
    said: list[str] = []
    folder, clock = Storage(tmp_path), FakeTime()
    with hold(folder, clock=clock, say=said.append) as lease:
        assert len(said) == 1 and "no conditional writes" in said[0] and "doctor" in said[0]
        assert clock.now() - 1_000_000 >= 3, "it waited before it read its record again"
        lease.renew()
        fence = Fence(folder, lease.owner, clock=clock)
        assert fence.begin(step=0) == 1
    # another process writes its record at the same moment, and is the last:
    clock.on_sleep = lambda now: (
        None if theirs else theirs.append(put_lease(folder, this_process(), renewed=now))
    )
    theirs: list[None] = []
    with pytest.raises(Held), hold(folder, clock=clock):
        pass
    assert LeaseFile(folder).read().owner == "theirs"


A, B, C = Attempt(1, 0), Attempt(2, 40), Attempt(3, 30)


@pytest.mark.parametrize(
    ("attempts", "attempt", "step", "expected"),
    [
        ((), 0, 50, False),  # a run of a version without attempts
        ((Attempt(1, 50),), 0, 50, False),  # and its resume
        ((Attempt(1, 50),), 0, 60, True),  # from which the resume did not continue: it was damaged
        ((A,), 1, 50, False),
        ((A, B), 1, 40, False),  # what attempt 2 continued from
        ((A, B), 1, 50, True),  # written by a rank 0 that had been replaced
        ((A, B), 2, 50, False),
        ((A, B, C), 2, 40, True),
        ((A, B, C), 1, 30, False),
        ((A, B, C), 1, 20, False),
        ((A, B, C), 3, 40, False),
    ],
)
def test_which_checkpoints_are_superseded(
    attempts: tuple[Attempt, ...], attempt: int, step: int, expected: bool
) -> None:
    assert is_superseded(attempts, attempt=attempt, step=step) is expected


def test_a_checkpoint_that_a_replaced_process_completes_late_is_not_used(folder: Storage) -> None:
    import torch

    from dreamfleet.trainers.run.checkpoint import Checkpoints

    def save(fence: Fence, step: int, by: str) -> None:
        # Without the guard, as if its checks had passed before the process was replaced.
        weights = {"w": torch.full((2,), float(step))}
        Checkpoints(folder, fence=fence).save(step, learned=weights, engine={"by": by}, meta={"by": by})

    old = begin_attempt(folder, None, step=0)
    save(old, 40, "old")
    new = begin_attempt(folder, None, step=40)
    save(old, 50, "old")
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [40], "attempt 2 continued from step 40"
    save(new, 50, "new")
    for _ in range(2):
        latest = checkpoints.load_latest()
        assert latest is not None and latest.step == 50 and latest.meta["by"] == latest.engine["by"] == "new"
        save(old, 50, "old")


WRITER = """
import sys, time
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.fence import Fence, Owner
from dreamfleet.trainers.run.checkpoint import Checkpoints
import torch
run = Storage(sys.argv[1])
fence = Fence(run, Owner(sys.argv[2], run.path()))
fence.begin(step=0)
checkpoints = Checkpoints(fence.guarded(), fence=fence, limit=2)
step = 0
while True:
    step += 1
    fence.guarded().append_text("metrics.jsonl", f"old {step}\\n")
    checkpoints.save(step, learned={"w": torch.full((300_000,), float(step))}, engine={}, meta={"by": "old"})
    print(step, flush=True)
"""


def test_a_paused_writer_that_wakes_after_a_takeover_damages_nothing(folder: Storage) -> None:
    """The old rank 0 is stopped anywhere in its loop of saves, also between a check and a write."""
    import torch

    from dreamfleet.trainers.run.checkpoint import Checkpoints

    for pause in (0.0, 0.007) if folder.is_local else (0.01,):
        with hold(folder, take_over=True) as old:
            writer = subprocess.Popen(
                [sys.executable, "-c", WRITER, folder.path(), old.owner.id],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert writer.stdout is not None
            for line in writer.stdout:
                if int(line) >= 3:
                    break
            time.sleep(pause)
            writer.send_signal(signal.SIGSTOP)
            with hold(folder, take_over=True) as new:
                found = Checkpoints(folder).load_latest()
                assert found is not None
                fence = begin_attempt(folder, new.owner, step=found.step)
                mine = Checkpoints(fence.guarded(), fence=fence, limit=2)
                for step in range(found.step + 1, found.step + 4):
                    mine.save(step, learned={"w": torch.full((4,), -1.0)}, engine={}, meta={"by": "new"})
                before = mine.load_latest()
                writer.send_signal(signal.SIGCONT)
                _, errors = writer.communicate(timeout=60)
                # It may also have lost the unfinished file that it was writing, as old checkpoints are removed.
                assert writer.returncode == 1 and ("LeaseLost" in errors or "No such file" in errors), errors
                latest = Checkpoints(folder).load_latest()
                assert latest is not None and before is not None
                assert latest.step == before.step and latest.meta["by"] == "new"
                assert torch.equal(latest.learned["w"], before.learned["w"])
                for step in range(found.step + 1, found.step + 4):
                    if step in mine.steps():
                        assert mine.load(step).meta["by"] == "new"
