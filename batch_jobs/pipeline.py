"""Jobs -> finished rows, on Ray Data: the pools of actors, what they are allowed, and when they have failed.

A pool's actors take several rows at once, each on a thread of its own, and its engine batches them: there is no
barrier between stories, blocks or stages. Ray Data holds the stages back from each other where one is slower.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch_jobs.monitor import Figures, Monitor
from batch_jobs.stages import Row
from minigpt5.errors import MiniGPT5Error

ENGINE_CPUS = 0.5
"""What an engine asks of Ray: on two cores both pools and a spare actor find a place."""
STORIES_AT_ONCE = 16
"""Stories that one generator has open: as many as share a step."""
PICTURES_AT_ONCE = 16
"""Pictures that one decoder has open: twice what share a step, so that the next are there when some are finished."""
MAX_BLOCKS = 4096
"""Blocks of a job's input: one story each, up to this many."""
TICK_S = 0.5
Loader = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many engines of a kind there are and what each asks of the cluster. The loader runs in the actors."""

    load: Loader
    least: int = 1
    most: int = 1
    num_gpus: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run gives up."""

    restarts: int = 20
    """Engine deaths of a whole run."""
    start_timeout_s: float = 600.0
    """Until each pool has an engine that is ready. One that fails to start ends the run at once."""


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


def through(dataset: Dataset, stage: type, *, pool: Pool, at_once: int, **arguments: Any) -> Dataset:
    """The rows of `dataset` through a pool of actors of `stage`, several at once in each, in any order.

    Ray Data starts an actor that died again without end; the end is `check_engines`.
    """
    return dataset.map_batches(
        stage,
        fn_constructor_args=(pool.load,),
        fn_constructor_kwargs={**arguments, "engine_id": this_actor},
        compute=ActorPoolStrategy(
            min_size=pool.least,
            max_size=pool.most,
            max_concurrent_calls_per_actor=at_once,
            max_tasks_in_flight_per_actor=at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=ENGINE_CPUS,
        num_gpus=pool.num_gpus or None,
        batch_size=None,
        batch_format="pyarrow",
    )


def this_actor() -> str:
    """The same before and after a restart."""
    name: str = ray.get_runtime_context().get_actor_id()
    return name


def finished_rows(
    dataset: Dataset, monitor: RemoteMonitor, limits: Limits, *, pools: tuple[str, ...]
) -> Iterator[Row | None]:
    """What comes out, and None twice a second where nothing does.

    Raises MiniGPT5Error where an engine cannot start or engines have died too often, and what Ray raises.
    """
    rows: queue.Queue[Row | BaseException | None] = queue.Queue(maxsize=256)

    def take() -> None:
        try:
            for row in dataset.iter_rows():
                rows.put(row)
            rows.put(None)
        except BaseException as failure:
            rows.put(failure)

    threading.Thread(target=take, name="finished rows", daemon=True).start()
    started = checked = time.monotonic()
    while True:
        try:
            row = rows.get(timeout=TICK_S)
        except queue.Empty:
            yield None
        else:
            if row is None:
                return
            if isinstance(row, BaseException):
                check_engines(monitor.figures(), limits, pools=(), waited_s=0.0)  # it may say more than Ray does
                raise row
            yield row
        if time.monotonic() - checked >= TICK_S:
            checked = time.monotonic()
            check_engines(monitor.figures(), limits, pools=pools, waited_s=checked - started)


def check_engines(figures: Figures, limits: Limits, *, pools: tuple[str, ...], waited_s: float) -> None:
    """Raise MiniGPT5Error where it is of no use to go on."""
    if figures.failure:
        raise MiniGPT5Error(f"{figures.failure}; see --model")
    num_deaths = sum(pool.deaths for pool in figures.pools.values())
    if num_deaths > limits.restarts:
        raise MiniGPT5Error(
            f"engines have died {num_deaths} times, more than --max-restarts {limits.restarts}: look for their cause "
            "(out of memory?) in Ray's logs; the same command goes on from here"
        )
    late = [name for name in pools if name not in figures.pools or not figures.pools[name].ready]
    if late and waited_s > limits.start_timeout_s:
        raise MiniGPT5Error(
            f"no {' and no '.join(late)} was ready after {waited_s:.0f} s: look at the cluster's free resources, or "
            "give it longer with --start-timeout"
        )


def connect(num_engines: int) -> None:
    """Join the cluster of $RAY_ADDRESS, else start one here with logical CPUs to spare; once in a process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a coming change
    if ray.is_initialized():
        pass
    elif os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        spare = int(num_engines * ENGINE_CPUS) + 2
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, spare),
            object_store_memory=512 * 2**20,  # pages pass through, they do not stay
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it raises is told once
    asked, there = num_engines * ENGINE_CPUS, ray.cluster_resources().get("CPU", 0)
    if asked > there:
        raise MiniGPT5Error(
            f"{num_engines} engines need {asked:g} CPUs but the cluster has {there:g}: ask for fewer --generators and "
            "--decoders, or add nodes"
        )
