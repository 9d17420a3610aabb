"""Jobs -> finished rows, on Ray Data: the pools of actors, what they are allowed, and when they have failed.

A pool's actors take several rows at once, each on a thread of its own, and its engine batches them: there is no
barrier between stories, blocks or stages. Ray Data holds the stages back from each other where one is slower.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch_jobs.monitor import Figures, Monitor
from batch_jobs.report import Report
from batch_jobs.stages import Decoder, Generator, Row
from minigpt5.errors import MiniGPT5Error
from minigpt5.evaluation.systems.face import System
from minigpt5.limits import ON_CPU, ON_GPU

ENGINE_CPUS = 0.5
"""Logical CPUs that Ray reserves for an engine."""
ROWS_PER_DECODER = 16
"""Concurrent rows of a decoder: twice its `max_batch`, so the next batch is ready."""
MAX_BLOCKS = 4096
"""Blocks of a job's input: one story each, up to this many."""
TICK_S = 0.5
"""Seconds between checks of the engines."""
Loader = Callable[[], Generator] | Callable[[], Decoder] | Callable[[], System]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Size of an actor pool and the resources of each engine. `load` runs inside the actors."""

    load: Loader
    min_engines: int = 1
    max_engines: int = 1
    num_gpus: float = 0.0
    """GPUs of each engine."""
    python: str = ""
    """Interpreter of the environment that the engine runs in, on each node; "": that of the job."""

    @property
    def rows_per_generator(self) -> int:
        """Concurrent rows of a generator: its `max_batch`."""
        return (ON_GPU if self.num_gpus else ON_CPU).max_batch


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run gives up."""

    max_deaths: int = 20
    """Engine deaths that a run tolerates, over all pools."""
    start_timeout_s: float = 600.0
    """Seconds until each pool has an engine that is ready. One that fails to start ends the run at once."""


class RemoteMonitor:
    """A Monitor in an actor on the driver's node, which shows its figures on the dashboard's metrics, too."""

    def __init__(self) -> None:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(_MonitorActor)
        self._actor = actor.options(num_cpus=0, scheduling_strategy=node, max_concurrency=1).remote()

    def starting(self, pool: str, engine: str) -> None:
        ray.get(self._actor.starting.remote(pool, engine))

    def ready(self, pool: str, engine: str) -> None:
        ray.get(self._actor.ready.remote(pool, engine))

    def cannot_start(self, pool: str, error: str) -> None:
        ray.get(self._actor.cannot_start.remote(pool, error))

    def enter(self, pool: str, row: str) -> int:
        num_deaths: int = ray.get(self._actor.enter.remote(pool, row))
        return num_deaths

    def leave(self, pool: str, row: str, life: str, busy_s: float, cpu_s: float) -> None:
        ray.get(self._actor.leave.remote(pool, row, life, busy_s, cpu_s))

    def figures(self) -> Figures:
        figures: Figures = ray.get(self._actor.figures.remote())
        return figures

    def show(self, done: int, total: int) -> None:
        self._actor.show.remote(done, total)


class _MonitorActor(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self._gauges = {
            name: Gauge(f"minigpt5_batch_{name}", description=description, tag_keys=tags)
            for name, description, tags in (
                ("rows_done", "Rows of the job that are finished", ()),
                ("rows_total", "Rows of the job", ()),
                ("pool_busy_seconds", "Seconds in which engines of a pool had a row", ("pool",)),
                ("pool_deaths", "Engines of a pool that have died", ("pool",)),
            )
        }

    def show(self, done: int, total: int) -> None:
        """Set the gauges."""
        self._gauges["rows_done"].set(done)
        self._gauges["rows_total"].set(total)
        for name, pool in self.figures().pools.items():
            self._gauges["pool_busy_seconds"].set(pool.busy_s, tags={"pool": name})
            self._gauges["pool_deaths"].set(pool.deaths, tags={"pool": name})


def new_dataset(jobs: pa.Table, *, name: str) -> Dataset:
    """Jobs as blocks of about one each; what the stages make of them are blocks of one page."""
    dataset = ray.data.from_arrow(jobs, override_num_blocks=min(jobs.num_rows, MAX_BLOCKS))
    dataset.context.target_max_block_size = 1  # a block for each page: it is drawn while the next one is written
    dataset.context.enable_progress_bars = False
    dataset.set_name(name)
    return dataset


def map_with_pool(
    dataset: Dataset, stage: type, *, pool: Pool, concurrency_per_actor: int, **arguments: Any
) -> Dataset:
    """Apply `stage` to the rows in a pool of actors. The order of rows is not kept.

    Ray Data restarts dead actors without limit; `check_failures` sets the limit.
    """
    return dataset.map_batches(
        stage,
        fn_constructor_args=(pool.load,),
        fn_constructor_kwargs={**arguments, "get_engine_id": get_actor_id},
        compute=ActorPoolStrategy(
            min_size=pool.min_engines,
            max_size=pool.max_engines,
            max_concurrent_calls_per_actor=concurrency_per_actor,
            max_tasks_in_flight_per_actor=concurrency_per_actor,
            enable_true_multi_threading=True,
        ),
        num_cpus=ENGINE_CPUS,
        num_gpus=pool.num_gpus or None,
        batch_size=None,
        batch_format="pyarrow",
        **({"runtime_env": {"py_executable": pool.python}} if pool.python else {}),
    )


def get_actor_id() -> str:
    """Return this actor's id. It stays the same when Ray restarts the actor."""
    actor_id: str = ray.get_runtime_context().get_actor_id()
    return actor_id


def finished_rows(
    dataset: Dataset,
    monitor: RemoteMonitor,
    limits: Limits,
    report: Report,
    *,
    pools: Mapping[str, Pool],
    tick_s: float = TICK_S,
) -> Iterator[Row | None]:
    """Yield the rows of `dataset` as they are finished, and None every `tick_s`.

    Every `tick_s` and at the end the dashboard's gauges are set from `report`; at the end the report gets the pools'
    figures. Raises MiniGPT5Error where an engine cannot start or engines have died too often, and what Ray raises.
    """
    rows: queue.Queue[Row | BaseException | None] = queue.Queue(maxsize=256)
    is_closed = threading.Event()

    def take() -> None:
        try:
            for row in dataset.iter_rows():
                rows.put(row)
                if is_closed.is_set():
                    return
            rows.put(None)
        except BaseException as failure:
            rows.put(failure)

    threading.Thread(target=take, name="finished rows", daemon=True).start()
    started = checked = time.monotonic()
    try:
        while True:
            try:
                row = rows.get(timeout=tick_s)
            except queue.Empty:
                pass
            else:
                if row is None:
                    break
                if isinstance(row, BaseException):
                    check_failures(monitor.figures(), limits)  # it may say more than Ray does
                    raise row
                yield row
            if time.monotonic() - checked >= tick_s:
                checked = time.monotonic()
                figures = monitor.figures()
                check_failures(figures, limits)
                check_started(figures, limits, pools=pools, waited_s=checked - started)
                monitor.show(report.skipped + report.done, report.rows)
                yield None
    finally:
        is_closed.set()
        with contextlib.suppress(queue.Empty):  # `take` may wait for a place
            while True:
                rows.get_nowait()
    monitor.show(report.skipped + report.done, report.rows)
    report.figures = monitor.figures()
    report.gpus = {name: pool.num_gpus for name, pool in pools.items()}


def check_failures(figures: Figures, limits: Limits) -> None:
    """Raise MiniGPT5Error where an engine could not start, or more have died than `limits` tolerate."""
    if figures.failure:
        raise MiniGPT5Error(f"{figures.failure}: check --model and the memory of the machine")
    num_deaths = sum(pool.deaths for pool in figures.pools.values())
    if num_deaths > limits.max_deaths:
        raise MiniGPT5Error(
            f"engines have died {num_deaths} times, more than --max-restarts {limits.max_deaths}: look for their cause "
            "(out of memory?) in Ray's logs; the same command goes on from here"
        )


def check_started(figures: Figures, limits: Limits, *, pools: Iterable[str], waited_s: float) -> None:
    """Raise MiniGPT5Error where one of `pools` has no engine that is ready after the limit's seconds."""
    late = [name for name in pools if name not in figures.pools or not figures.pools[name].ready]
    if late and waited_s > limits.start_timeout_s:
        raise MiniGPT5Error(
            f"no {' and no '.join(late)} was ready after {waited_s:.0f} s: look at the cluster's free resources, or "
            "give it longer with --start-timeout"
        )


def connect(num_engines: int) -> None:
    """Join the cluster of $RAY_ADDRESS, else start one here with CPUs for `num_engines`; once in a process."""
    # Avoids Ray's FutureWarning about actors with num_gpus=0.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            num_cpus = int(num_engines * ENGINE_CPUS) + 2  # two for Ray Data's own tasks
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, num_cpus),
                object_store_memory=512 * 2**20,  # pages pass through, they do not stay
                include_dashboard=False,
                **quiet,
            )
    # Ray Data logs an error and also raises it; the command prints the raised one.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def check_capacity(num_engines: int, num_gpus: float = 0.0) -> None:
    """Raise MiniGPT5Error where the cluster has not the CPUs for `num_engines`, or `num_gpus` for each of them."""
    for kind, needed in (("CPU", num_engines * ENGINE_CPUS), ("GPU", num_engines * num_gpus)):
        available = ray.cluster_resources().get(kind, 0)
        if needed > available:
            raise MiniGPT5Error(
                f"{num_engines} engines need {needed:g} {kind}s but the cluster has {available:g}: ask for fewer "
                "engines (--generators, --decoders, --workers), or add nodes"
            )
