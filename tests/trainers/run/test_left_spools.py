"""Tests of checkpoints that a process which ended left on the disk, and that the next start stores in the bucket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from servers import S3Server, s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run import spool
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.fence import Fence, begin_attempt
from dreamfleet.trainers.run.left_spools import store_left_checkpoint
from dreamfleet.trainers.run.spool import ORIGIN, Origin, Spool

pytestmark = pytest.mark.s3
# The weights of a step: its number.
STATE: Callable[[int], dict[str, dict[str, torch.Tensor]]] = lambda step: {  # noqa: E731
    "learned": {"w": torch.full((3,), float(step))},
    "engine": {"m": torch.zeros(2)},
}


@pytest.fixture
def run(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:  # noqa: F811
    """Return a run folder in the bucket with a checkpoint of step 2; spools are in the test's folder."""
    s3_server.set_environment(monkeypatch)
    monkeypatch.setattr(spool, "spool_root", lambda: tmp_path / "spool")
    return Storage(s3_server.new_folder())


@pytest.fixture
def running() -> Iterator[int]:
    """The pid of another process that runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


def open_run(run: Storage) -> Checkpoints:
    """Return the checkpoints of a run whose first attempt saved step 2."""
    fence = begin_attempt(run, None, step=0)
    checkpoints = Checkpoints(fence.guarded(), fence=fence)
    checkpoints.write(2, **STATE(2), meta={"method": "x"})
    return checkpoints


def leave(checkpoints: Checkpoints, *steps: int, pid: int | None = None) -> Spool:
    """Leave checkpoints on the disk, as a process does that ends while the bucket is away."""
    left = Spool(checkpoints.storage)
    left.sign(checkpoints.fence)
    for step in steps:
        left.checkpoints.write(step, **STATE(step), meta={"method": "x"})
    origin = Origin.read(left.folder)
    assert origin is not None
    # A pid that no process can have: the process has ended.
    changed = replace(origin, holder=replace(origin.holder, pid=pid or 2**31 - 1))
    if pid:
        changed = replace(changed, holder=replace(changed.holder, started=started(pid)))
    write_origin(left, changed)
    return left


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def write_origin(left: Spool, origin: Origin) -> None:
    tree = {**vars(origin), "holder": vars(origin.holder)}
    (left.folder / ORIGIN).write_text(json.dumps(tree))


def recover(run: Storage) -> tuple[int | None, Checkpoints]:
    """Start the run again; return the step that was stored, and the bucket's checkpoints."""
    fence = Fence(run, None)
    checkpoints = Checkpoints(fence.guarded(), fence=fence)
    stored = store_left_checkpoint(checkpoints, fence)
    newest = checkpoints.steps()[-1]
    fence.begin(step=newest)
    return stored, checkpoints


def test_the_newest_is_stored_and_the_folders_are_removed(run: Storage, tmp_path: Path) -> None:
    before = open_run(run)
    leave(before, 4, 6)
    leave(before, 5)
    stored, checkpoints = recover(run)
    assert stored == 6 and checkpoints.steps() == [2, 6]
    assert checkpoints.load(6).learned["w"].tolist() == [6, 6, 6]
    assert not list(tmp_path.rglob("manifest*.json"))
    assert recover(run)[0] is None and checkpoints.steps() == [2, 6]


def test_a_damaged_one_is_ignored_with_a_line_and_the_one_before_is_stored(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    before = open_run(run)
    left = leave(before, 4, 6)
    (left.folder / "checkpoints" / "step-000006" / "engine.pt").write_bytes(b"cut")
    stored, checkpoints = recover(run)
    assert stored == 4 and checkpoints.steps() == [2, 4]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step 6" in line and "engine.pt is damaged" in line and str(left.folder) in line


def test_a_partial_one_is_ignored_with_a_line(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    left = leave(open_run(run), 4)
    (left.folder / "checkpoints" / "step-000004" / "manifest.json").unlink()
    stored, checkpoints = recover(run)
    assert stored is None and checkpoints.steps() == [2] and not left.folder.exists()
    assert f"{left.folder}, left by a process that ended, has no complete checkpoint" in caplog.text


def test_one_that_the_run_went_on_without_is_not_stored(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    left = leave(open_run(run), 4)
    begin_attempt(run, None, step=2)  # on another machine
    stored, checkpoints = recover(run)
    assert stored is None and checkpoints.steps() == [2] and not left.folder.exists()
    assert "the run went on from an older one" in caplog.text


def test_one_that_is_older_than_the_buckets_is_not_stored(run: Storage) -> None:
    before = open_run(run)
    leave(before, 4)
    before.write(6, **STATE(6), meta={"method": "x"})
    stored, checkpoints = recover(run)
    assert stored is None and checkpoints.steps() == [2, 6]


def test_one_of_a_removed_run_at_the_same_address_is_not_stored(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    left = leave(open_run(run), 4)
    run.remove("")
    open_run(run)  # its first attempt has the same number
    stored, checkpoints = recover(run)
    assert stored is None and checkpoints.steps() == [2] and not left.folder.exists()
    assert "no attempt of this run wrote it" in caplog.text


def test_a_process_that_runs_keeps_its_folder(run: Storage, running: int) -> None:
    left = leave(open_run(run), 4, pid=running)
    stored, checkpoints = recover(run)
    assert stored is None and checkpoints.steps() == [2]
    assert left.checkpoints.steps() == [4]


def test_a_start_that_is_interrupted_after_its_attempt_began_can_be_repeated(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(open_run(run), 4)
    with monkeypatch.context() as broken:
        broken.setattr(Checkpoints, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            recover(run)
    stored, checkpoints = recover(run)
    assert stored == 4 and checkpoints.steps() == [2, 4]
