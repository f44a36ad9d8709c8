"""The driver of a pool with workers that live in the test."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
from task_sources import ListSource

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.tune.pool.dispatch import Dispatcher, Events
from dreamfleet.tune.pool.worker import Died, Ended, Event, Ready, Round, Started

DONE = End("completed")


def tasks(count: int) -> list[Task]:
    return [Task(f"task-{number}", {}) for number in range(count)]


class Acted:
    """A worker that follows ``act(worker, task)``, which emits events, or keeps the task running."""

    def __init__(self, events: Events, act: Callable[[Acted, Task], None], log: list[str]):
        self.events, self.act, self.log = events, act, log
        self.running: list[str] = []
        self.closed = False
        self.answers: list[tuple[str, bool]] = []
        self.emit(Ready())

    def emit(self, event: Event) -> None:
        self.events.put((self, event))

    def start(self, task: Task) -> None:
        assert not self.closed
        self.running.append(task.name)
        self.emit(Started(task.name))
        self.act(self, task)

    def finish(self, name: str, end: End = DONE, reusable: bool = True) -> None:
        self.running.remove(name)
        self.emit(Ended(name, end, reusable))

    def answer(self, name: str, stop: bool) -> None:
        self.answers.append((name, stop))
        self.finish(name, End("stopped") if stop else DONE)

    def stop(self) -> None:
        for name in list(self.running):
            self.finish(name, End("interrupted"))

    def close(self) -> None:
        self.closed = True


class Pool:
    """A dispatcher of ``num_workers`` workers that all follow ``act``."""

    def __init__(self, source: ListSource, act: Callable[[Acted, Task], None], **options: Any):
        self.events: Events = queue.SimpleQueue()
        self.workers: list[Acted] = []
        self.log: list[str] = []
        self.act = act
        self.dispatcher = Dispatcher(source, self.make, self.events, **{"num_workers": 2, **options})

    def make(self) -> Acted:
        self.workers.append(Acted(self.events, self.act, self.log))
        return self.workers[-1]

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        complete = self.dispatcher.run(should_stop)
        assert all(worker.closed for worker in self.workers)
        return complete


def test_tasks_are_spread_over_the_workers_and_slots_are_refilled_at_once() -> None:
    most: list[int] = []

    def act(worker: Acted, task: Task) -> None:
        most.append(len(worker.running))
        if len(source.ends) + sum(len(one.running) for one in pool.workers) in (4, 5, 6, 7):
            worker.finish(worker.running[0])
        if not source.left:
            for one in pool.workers:
                for name in list(one.running):
                    one.finish(name)

    source = ListSource(tasks(7))
    pool = Pool(source, act, slots=2)
    assert pool.run()
    assert max(most) == 2 and most[:4] == [1, 1, 2, 2], "each worker gets one before any gets two"
    assert [task.name for task in source.starts] == [task.name for task in tasks(7)]
    assert set(source.ends.values()) == {DONE} and len(source.ends) == 7
    assert len(pool.workers) == 2, "workers are kept for the next task"


def test_no_more_tasks_run_at_once_than_allowed() -> None:
    counts: list[int] = []

    def act(worker: Acted, task: Task) -> None:
        counts.append(sum(len(one.running) for one in pool.workers))
        if counts[-1] == 3:
            worker.finish(task.name)
        if not source.left:
            for one in pool.workers:
                one.stop()

    source = ListSource(tasks(6))
    pool = Pool(source, act, slots=2, max_concurrent=3)
    pool.run()
    assert max(counts) == 3


def test_a_worker_with_less_memory_gets_fewer_tasks() -> None:
    class Small(Acted):
        def emit(self, event: Event) -> None:
            super().emit(Ready(2) if isinstance(event, Ready) else event)

    counts: list[int] = []

    def act(worker: Acted, task: Task) -> None:
        counts.append(len(worker.running))

    source = ListSource(tasks(4))
    pool = Pool(source, act, num_workers=1, slots=3)
    pool.dispatcher.make_worker = lambda: Small(pool.events, act, pool.log)
    assert not pool.dispatcher.run(lambda: bool(counts))
    assert counts == [1, 2]


def test_rounds_are_decided_by_the_source() -> None:
    answers = iter([None, None, True, False])

    def act(worker: Acted, task: Task) -> None:
        worker.emit(Round(task.name, {"step": 10, "loss": 0.5}))

    source = ListSource(tasks(2), lambda task, figures: next(answers))
    pool = Pool(source, act, num_workers=1)
    assert pool.run()
    assert pool.workers[0].answers == [("task-0", True), ("task-1", False)]
    assert source.ends == {"task-0": End("stopped"), "task-1": DONE}
    assert source.rounds["task-0"] == [{"step": 10, "loss": 0.5}]


def test_a_worker_that_leaves_memory_behind_is_replaced_when_it_is_empty() -> None:
    def act(worker: Acted, task: Task) -> None:
        if len(worker.running) == 2:
            worker.finish(worker.running[0], reusable=False)
        elif pool.workers.index(worker) == 1:
            worker.finish(task.name)

    source = ListSource(tasks(3))
    pool = Pool(source, act, num_workers=1, slots=2)
    original = source.on_end

    def on_end(task: Task, end: End) -> None:
        original(task, end)
        if task.name == "task-0":
            assert pool.workers[0].running == ["task-1"] and not pool.workers[0].closed
            pool.workers[0].finish("task-1")

    source.on_end = on_end  # type: ignore[method-assign]
    assert pool.run()
    assert len(pool.workers) == 2 and len(source.ends) == 3


def test_the_tasks_of_a_dead_worker_go_on_from_their_last_round_elsewhere() -> None:
    def act(worker: Acted, task: Task) -> None:
        if task.last_step < 0:
            worker.emit(Round(task.name, {"step": 10}))
            if len(worker.running) == 2:
                worker.emit(Died("killed"))
        else:
            worker.finish(task.name)

    source = ListSource(tasks(2), lambda task, figures: None)
    pool = Pool(source, act, num_workers=1, slots=2)
    assert pool.run()
    assert len(pool.workers) == 2
    assert [(task.name, task.last_step) for task in source.starts] == [
        ("task-0", -1),
        ("task-1", -1),
        ("task-0", 10),
        ("task-1", 10),
    ]
    assert set(source.ends.values()) == {DONE}


def test_a_task_that_kills_its_process_fails_and_its_neighbours_complete() -> None:
    """The pack dies twice; from then on each task is alone."""

    def act(worker: Acted, task: Task) -> None:
        is_last = len(worker.running) == 3 - len(source.ends)
        if starts(task.name) < 2:  # packed
            if is_last:
                worker.emit(Died("out of memory"))
            return
        assert worker.running == [task.name], "it shares its process again"
        if task.name == "task-1":
            worker.emit(Died("out of memory"))
        else:
            worker.finish(task.name)

    def starts(name: str) -> int:
        return sum(task.name == name for task in source.starts)

    source = ListSource(tasks(3))
    pool = Pool(source, act, num_workers=1, slots=3, max_failures=3)
    assert pool.run()
    assert {name: end.exit_reason for name, end in source.ends.items()} == {
        "task-0": "completed",
        "task-1": "failed",
        "task-2": "completed",
    }
    assert "out of memory" in str(source.ends["task-1"].error) and source.ends["task-1"].kind == "RunFailed"
    assert starts("task-1") == 4 and starts("task-0") == starts("task-2") == 3


def test_a_decision_to_stop_survives_the_death_of_the_worker() -> None:
    def act(worker: Acted, task: Task) -> None:
        worker.emit(Round(task.name, {"step": 10 if task.last_step < 0 else 20}))
        if task.last_step < 0:
            worker.emit(Died("killed"))

    source = ListSource(tasks(1), lambda task, figures: True if figures["step"] == 10 else None)
    pool = Pool(source, act, num_workers=1)
    assert pool.run()
    assert source.ends == {"task-0": End("stopped")} and source.rounds == {"task-0": [{"step": 10}]}


def test_a_stop_ends_running_tasks_and_starts_no_others() -> None:
    source = ListSource(tasks(5))
    pool = Pool(source, lambda worker, task: None, slots=1)
    assert not pool.run(lambda: len(source.starts) == 2)
    assert source.ends == {"task-0": End("interrupted"), "task-1": End("interrupted")}


def test_every_task_that_was_given_out_ends_when_a_worker_dies_during_a_stop() -> None:
    source = ListSource(tasks(2))
    pool = Pool(source, lambda worker, task: None, num_workers=1)
    pool.make = lambda: Dying(pool.events, pool.act, pool.log)  # type: ignore[method-assign]
    pool.dispatcher.make_worker = pool.make

    class Dying(Acted):
        def stop(self) -> None:
            self.emit(Died("killed"))

    assert not pool.run(lambda: len(source.starts) == 1)
    assert source.ends == {"task-0": End("interrupted")}


def test_workers_that_cannot_start_end_the_pool() -> None:
    class Broken(Acted):
        def emit(self, event: Event) -> None:
            super().emit(Died("no module named torch") if isinstance(event, Ready) else event)

    pool = Pool(ListSource(tasks(1)), lambda worker, task: None)
    pool.dispatcher.make_worker = lambda: Broken(pool.events, pool.act, pool.log)
    with pytest.raises(RunFailed, match="no module named torch"):
        pool.run()


def test_a_source_without_a_task_now_is_asked_again() -> None:
    class Slow(ListSource):
        def next_task(self) -> Task | None:
            asked.append(1)
            return super().next_task() if len(asked) > 3 else None

    asked: list[int] = []
    source = Slow(tasks(1))
    assert Pool(source, lambda worker, task: worker.finish(task.name), num_workers=1).run()
    assert source.ends == {"task-0": DONE}
