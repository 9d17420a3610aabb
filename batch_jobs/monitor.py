"""What the engines of a job are at: who has started, which rows are in them, how long they were busy.

One Monitor a run, in an actor beside the driver; stages call it at the begin and the end of each row. It knows in
which rows an engine has died, so that a row which kills engines does not kill them for ever.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from minigpt5.errors import MiniGPT5Error
from minigpt5.story.stream import describe

MAX_DEATHS = 2
"""A row that was in flight at so many engine deaths becomes an error."""


@dataclass
class PoolFigures:
    """One pool since the run began."""

    engines: int = 0
    """That have started, each once however often it was started again."""
    ready: int = 0
    """Engines that have been ready; the death of one that is started again takes nothing off."""
    deaths: int = 0
    rows: int = 0
    busy_s: float = 0.0
    """Added up over the engines: while at least one row was in them."""
    cpu_s: float = 0.0
    """Core-seconds of the engines' processes, their start left out."""
    first_s: float = 0.0
    """When the first row went in and the last came out, by the clock of the monitor's machine."""
    last_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.last_s - self.first_s

    def utilisation(self) -> float:
        """Busy seconds over engines times wall seconds, from the pool's first row to its last."""
        return self.busy_s / (self.engines * self.seconds) if self.seconds and self.engines else 0.0


@dataclass
class Figures:
    """All pools."""

    pools: dict[str, PoolFigures] = field(default_factory=dict)
    failure: str = ""
    """Why an engine could not start."""


class Watch(Protocol):
    """What a stage needs of a monitor."""

    def starting(self, pool: str, engine: str) -> None: ...
    def ready(self, pool: str, engine: str) -> None: ...
    def cannot_start(self, pool: str, error: str) -> None: ...
    def enter(self, pool: str, row: str) -> int: ...
    def leave(self, pool: str, row: str, life: str, busy_s: float, cpu_s: float) -> None: ...


class Monitor:
    """The figures of one run; a plain object, which `batch_jobs/pipeline.py` puts into an actor."""

    def __init__(self) -> None:
        self._figures = Figures()
        self._starts: dict[tuple[str, str], int] = {}
        self._ready: set[tuple[str, str]] = set()
        self._inside: dict[tuple[str, str], int] = {}
        self._lives: dict[tuple[str, str], tuple[float, float]] = {}

    def starting(self, pool: str, engine: str) -> None:
        """An engine begins to load; one whose process died is the same engine again."""
        self._starts[pool, engine] = self._starts.get((pool, engine), 0) + 1

    def ready(self, pool: str, engine: str) -> None:
        self._ready.add((pool, engine))

    def cannot_start(self, pool: str, error: str) -> None:
        self._figures.failure = f"the {pool} cannot start: {error}"

    def enter(self, pool: str, row: str) -> int:
        """A row goes into an engine; how many engines have died with it before."""
        self._pool(pool).first_s = self._pool(pool).first_s or time.monotonic()
        num_deaths = self._inside.get((pool, row), 0)
        self._inside[pool, row] = num_deaths + 1
        return num_deaths

    def leave(self, pool: str, row: str, life: str, busy_s: float, cpu_s: float) -> None:
        """A row has come out; `busy_s` and `cpu_s` are those of the engine since it was started."""
        self._inside.pop((pool, row), None)
        figures = self._pool(pool)
        figures.rows, figures.last_s = figures.rows + 1, time.monotonic()
        busy_before, cpu_before = self._lives.get((pool, life), (0.0, 0.0))
        self._lives[pool, life] = max(busy_s, busy_before), max(cpu_s, cpu_before)

    def figures(self) -> Figures:
        for name in {pool for pool, _ in self._starts}:
            figures = self._pool(name)
            starts = [count for (pool, _), count in self._starts.items() if pool == name]
            lives = [spent for (pool, _), spent in self._lives.items() if pool == name]
            figures.engines, figures.deaths = len(starts), sum(starts) - len(starts)
            figures.ready = sum(pool == name for pool, _ in self._ready)
            figures.busy_s, figures.cpu_s = sum(busy for busy, _ in lives), sum(cpu for _, cpu in lives)
        return self._figures

    def _pool(self, name: str) -> PoolFigures:
        return self._figures.pools.setdefault(name, PoolFigures())


E = TypeVar("E")


class Seat(Generic[E]):
    """An engine in its process, with the rows that are in it counted.

    Example: seat = Seat("decoder", load, watch, engine_id="a1"); with seat.row("fox/1") as num_deaths: ...
    """

    def __init__(self, pool: str, load: Callable[[], E], watch: Watch, *, engine_id: str) -> None:
        """Loads the engine. What `load` raises is told to `watch` before it is raised."""
        self.pool, self.watch = pool, watch
        self._life = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._num_inside, self._since, self._busy_s = 0, 0.0, 0.0
        watch.starting(pool, engine_id)
        try:
            self.engine = load()
        except Exception as failure:
            watch.cannot_start(pool, f"{type(failure).__name__}: {describe(failure)}")
            raise
        self._cpu_at_start = time.process_time()
        watch.ready(pool, engine_id)

    @contextlib.contextmanager
    def row(self, row: str) -> Iterator[int]:
        """While the engine works on it; gives how many engines died with the row."""
        num_deaths = self.watch.enter(self.pool, row)
        with self._lock:
            if not self._num_inside:
                self._since = time.monotonic()
            self._num_inside += 1
        try:
            yield num_deaths
        finally:
            with self._lock:
                self._num_inside -= 1
                now = time.monotonic()
                busy_s = self._busy_s + now - self._since
                if not self._num_inside:
                    self._busy_s = busy_s
            self.watch.leave(self.pool, row, self._life, busy_s, time.process_time() - self._cpu_at_start)


class DiedTooOften(MiniGPT5Error):
    """A row that was in flight when engines died is not tried again."""


def check_deaths(num_deaths: int) -> None:
    """Raise DiedTooOften where a row has had its tries."""
    if num_deaths >= MAX_DEATHS:
        raise DiedTooOften(f"in flight at {num_deaths} engine deaths: it is not tried again")


def summary(figures: Figures, *, num_pictures: int, gpus: dict[str, float] | None = None) -> dict[str, Any]:
    """Summarise each pool: utilisation, deaths, cost of a page. `gpus`: GPUs of one engine of a pool."""
    gpus = gpus or {}
    return {
        name: {
            "engines": pool.engines,
            "deaths": pool.deaths,
            "rows": pool.rows,
            "busy_s": round(pool.busy_s, 2),
            "utilisation": round(pool.utilisation(), 3),
            "core_s_per_page": round(pool.cpu_s / num_pictures, 3) if num_pictures else None,
            "gpu_s_per_page": round(gpus.get(name, 0.0) * pool.busy_s / max(1, num_pictures), 3),
        }
        for name, pool in figures.pools.items()
    }
