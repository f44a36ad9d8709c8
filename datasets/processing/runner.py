"""Applies a function or a model to many rows: in this process, in processes of this machine, or on Ray Data.

`data prepare`, `caption`, `measure` and `cache` run on this module. A row is a dictionary of JSON values.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dreamfleet.datasets.environment import apply_variables, variables_to_send
from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.json_text import json_text

WINDOW_ROWS = 65_536  # rows of one Ray Data execution: bounds the object store, and hides its start-up time
AHEAD = 2  # batches that wait for each local process

Row = dict[str, Any]
Work = Callable[[list[Row]], list[Row]]
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Workers:
    """Who works: ``count`` processes of this machine (1: this process), or ``count`` Ray workers with ``on_ray``.

    ``resources`` are Ray's for each of them, and ``environment`` the variables of its process. Ray must be running with
    ``on_ray``.
    """

    count: int = 1
    on_ray: bool = False
    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    environment: Mapping[str, str] = field(default_factory=dict)


class Stage(NamedTuple):
    """A step of a Ray Data pipeline: ``make()`` returns the function that is applied to each batch of columns.

    With ``actors``, this number of processes call ``make`` once each, for example to load a model; without, tasks call
    it for each batch.
    """

    make: Callable[[], Callable[[Columns], Columns]]
    resources: Mapping[str, float]
    actors: int | None = None


def process(
    rows: Sequence[Row] | Iterator[Row],
    make: Callable[[], Work],
    workers: Workers,
    *,
    batch_size: int,
    keeps: bool = False,
    buckets: bool = True,
) -> Iterator[Row]:
    """Yield the rows that the function returned by ``make`` returns for batches of rows, in any order.

    ``make`` is called once in each process; it must be picklable. ``keeps``: it loads a model, so that Ray runs actors
    instead of tasks. ``buckets``: workers need the keys of buckets. Raises the first UserError of a worker, and
    RunFailed if workers fail otherwise.
    """
    batches = _batched(iter(rows), batch_size)
    if workers.on_ray:
        yield from _rows_on_ray(batches, make, workers, keeps=keeps, buckets=buckets, batch_size=batch_size)
    elif workers.count <= 1:
        work: Work | None = None
        for batch in batches:
            work = work or make()
            yield from work(batch)
    else:
        yield from _rows_in_processes(batches, make, workers.count)


def run_on_ray(
    tables: Sequence[Any],
    stages: Sequence[Stage],
    *,
    environment: Mapping[str, str],
    buckets: bool,
    batch_rows: int | None = None,
    what: str = "the work",
) -> Iterator[Columns]:
    """Run Arrow tables, of which each is a batch, through stages on Ray Data; yield the columns of each result.

    ``batch_rows`` is the largest number of rows of a table, which Ray Data requires of actors with GPUs. Raises
    RunFailed, with the cause, if a stage raises.
    """
    import ray.data
    import ray.exceptions

    # Otherwise it logs messages about options that are set here.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow(list(tables))
    dataset.context.print_on_execution_start = False
    dataset.context.enable_progress_bars = False
    variables, sent = {"env_vars": dict(environment)}, variables_to_send(buckets=buckets)
    for stage in stages:
        asked = dict(stage.resources)
        options: dict[str, Any] = {
            "batch_format": "numpy",
            "num_cpus": asked.pop("CPU", 0),
            "num_gpus": asked.pop("GPU", 0),
            "resources": asked or None,
            "runtime_env": variables,
        }
        # Secrets are sent inside closures, since Ray logs runtime environments and may display arguments.
        if stage.actors is None:
            dataset = dataset.map_batches(_as_task(stage.make, sent), batch_size=None, **options)
        else:
            pool = ray.data.ActorPoolStrategy(size=max(1, min(stage.actors, len(tables))))
            kept = {"make": _with_variables(stage.make, sent)}
            dataset = dataset.map_batches(
                _Kept, fn_constructor_kwargs=kept, batch_size=batch_rows, compute=pool, **options
            )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="numpy")
    except ray.exceptions.RayError as error:
        # Extract the message from Ray's long text of tracebacks and advice.
        found = re.findall(r"^(?!ray\.)[\w.]+(?:Error|Exception): .*", str(error), re.MULTILINE)
        why = found[-1] if found else type(error).__name__
        raise RunFailed(
            f"{what} failed ({why[:300]}). Results are kept; run the same command again to continue"
        ) from error


class _Kept:
    """Calls ``make`` once in an actor, and the function that it returns for each batch."""

    def __init__(self, make: Callable[[], Callable[[Columns], Columns]]) -> None:
        self._call = make()

    def __call__(self, batch: Columns) -> Columns:
        return self._call(batch)


class _RowStage:
    """Applies a function of rows to the column `row` of JSON texts; a UserError is returned as a row with `failure`."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self._make = make
        self._work: Work | None = None

    def __call__(self, batch: Columns) -> Columns:
        # An error that a user can fix is returned as data, since Ray would wrap an exception.
        try:
            self._work = self._work or self._make()
            found = self._work([json.loads(text) for text in batch["row"]])
        except UserError as error:
            found = [{"failure": str(error), "kind": type(error).__name__}]
        return {"row": np.array([json_text(row) for row in found], dtype=object)}


def _rows_on_ray(
    batches: Iterator[list[Row]],
    make: Callable[[], Work],
    workers: Workers,
    *,
    keeps: bool,
    buckets: bool,
    batch_size: int,
) -> Iterator[Row]:
    import pyarrow as pa

    stage = Stage(_row_stage(make), workers.resources, workers.count if keeps else None)
    while window := list(islice(batches, max(1, WINDOW_ROWS // batch_size))):
        tables = [pa.table({"row": [json_text(row) for row in batch]}) for batch in window]
        results = run_on_ray(
            tables, [stage], environment=workers.environment, buckets=buckets, batch_rows=batch_size
        )
        for columns in results:
            for text in columns["row"]:
                row = json.loads(text)
                if "failure" in row:
                    raise _user_error(row["kind"], row["failure"])
                yield row


def _rows_in_processes(batches: Iterator[list[Row]], make: Callable[[], Work], count: int) -> Iterator[Row]:
    """Yield results in the order of the batches, of which a limited number is read ahead."""
    # Spawned, because a fork of a process with the threads of a bucket connection would hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_start, initargs=(make,)) as pool:
        waiting: list[Future[list[Row]]] = []
        try:
            for batch in batches:
                waiting.append(pool.submit(_call, batch))
                if len(waiting) >= AHEAD * count:
                    yield from waiting.pop(0).result()
            for future in waiting:
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_own: dict[str, Any] = {}  # of a spawned process: how to make its function, and the function


def _start(make: Callable[[], Work]) -> None:
    _own["make"] = make


def _call(batch: list[Row]) -> list[Row]:
    if "work" not in _own:
        _own["work"] = _own["make"]()
    found: list[Row] = _own["work"](batch)
    return found


def _row_stage(make: Callable[[], Work]) -> Callable[[], Callable[[Columns], Columns]]:
    return lambda: _RowStage(make)


def _with_variables(make: Callable[[], Any], sent: Mapping[str, str]) -> Callable[[], Any]:
    def make_there() -> Any:
        apply_variables(sent)
        return make()

    return make_there


def _as_task(
    make: Callable[[], Callable[[Columns], Columns]], sent: Mapping[str, str]
) -> Callable[[Columns], Columns]:
    def call(batch: Columns) -> Columns:
        apply_variables(sent)
        return make()(batch)

    return call


def _user_error(kind: str, text: str) -> UserError:
    found = next((one for one in UserError.__subclasses__() if one.__name__ == kind), UserError)
    return found(text)


def _batched(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(islice(rows, size)):
        yield batch


@contextmanager
def reading_ahead(
    read: Callable[[Any], Any], items: Iterable[Any], *, threads: int
) -> Iterator[Iterator[Any]]:
    """Yield the results of ``read`` for all items in order, which threads compute ahead of their use."""
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="reader") as pool:
        futures = [pool.submit(read, item) for item in items]
        try:
            yield (future.result() for future in futures)
        finally:
            for future in futures:
                future.cancel()
