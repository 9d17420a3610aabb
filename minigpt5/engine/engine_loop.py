"""An engine's thread: requests of many asyncio loops -> steps that several of them share.

An engine adds three functions: one chooses the jobs of the next step, one makes the step, and one gives back what a
leaving job holds. Both engines are built on this.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any, Generic, TypeVar

from minigpt5.engine.fair_share import FairShare, Occupancy
from minigpt5.errors import EngineFull

E = TypeVar("E")

END_TIMEOUT_S = 10.0
"""How long the end of the interpreter waits for the step under way."""


class Job(Generic[E]):
    """One request inside an engine, with the events that its caller is still to hear."""

    def __init__(self, *, key: str, cost: float) -> None:
        self.key = key
        self.cost = cost
        """Work that is left, in the engine's own unit."""
        self.is_started = False
        self.is_done = False
        self.is_cancelled = False
        self.failure: Exception | None = None
        self.events: asyncio.Queue[E | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, event: E) -> None:
        self._send(event)

    def fail(self, failure: Exception) -> None:
        self.failure, self.is_done = failure, True

    def close(self) -> None:
        """The last thing a caller hears."""
        self._send(self.failure)

    def _send(self, event: E | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the caller's loop is closed: nobody listens
            self.is_cancelled = True


J = TypeVar("J", bound=Job[Any])


class EngineLoop(Generic[J]):
    """Runs jobs step by step on a thread of its own, which starts with the first job."""

    def __init__(
        self,
        name: str,
        *,
        choose: Callable[[list[J]], list[J]],
        advance: Callable[[list[J]], None],
        leave: Callable[[J], None],
        max_jobs: int,
    ) -> None:
        self._name, self.max_jobs = name, max_jobs
        self._choose, self._advance, self._leave = choose, advance, leave
        self._jobs: list[J] = []
        self._signal = _Signal()
        self._thread: threading.Thread | None = None

    @property
    def num_running(self) -> int:
        """Jobs that have taken part in a step and are not done."""
        return sum(job.is_started for job in list(self._jobs))

    @property
    def num_waiting(self) -> int:
        return sum(not job.is_started for job in list(self._jobs))

    @property
    def queued_cost(self) -> float:
        """Work that is left of all jobs."""
        return sum(job.cost for job in list(self._jobs))

    async def run(self, job: J) -> AsyncGenerator[Any, None]:
        """The job's events. Closing the iterator takes the job out before the next step. Raises EngineFull."""
        self._add(job)
        try:
            while (event := await job.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            job.is_cancelled = True

    def _add(self, job: J) -> None:
        with self._signal.changed:
            if len(self._jobs) >= self.max_jobs:
                raise EngineFull(f"the {self._name} takes at most {self.max_jobs} requests at once: try again later")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work, args=(weakref.ref(self), self._signal), name=self._name, daemon=True
                )
                self._thread.start()
                # A thread that is in the middle of a step when the interpreter ends would bring it down.
                weakref.finalize(self, _end, self._thread, self._signal)
            self._jobs.append(job)
            self._signal.has_work = True
            self._signal.changed.notify()

    def step(self) -> None:
        """Advance some jobs, and let go of those that are done or cancelled."""
        jobs = list(self._jobs)
        chosen: list[J] = []
        try:
            chosen = self._choose([job for job in jobs if not job.is_cancelled])
            if chosen:
                self._advance(chosen)
        except Exception as failure:  # those of this step fail, the engine lives on
            for job in chosen or jobs:
                job.fail(failure)
        leaving = [job for job in jobs if job.is_done or job.is_cancelled]
        for job in leaving:
            try:
                self._leave(job)
            except Exception as failure:  # it fails alone
                job.fail(job.failure or failure)
        with self._signal.changed:
            self._jobs = [job for job in self._jobs if job not in leaving]
            self._signal.has_work = bool(self._jobs)
        for job in leaving:
            job.close()


class QueuedEngine:
    """An engine behind an EngineLoop, as others see how much it has to do. The unit of a job's cost is the engine's."""

    _loop: EngineLoop[Any]
    _fair: FairShare

    @property
    def num_running(self) -> int:
        """Jobs that have begun."""
        return self._loop.num_running

    @property
    def num_waiting(self) -> int:
        return self._loop.num_waiting

    @property
    def queued_cost(self) -> float:
        """Work that is left of all jobs."""
        return self._loop.queued_cost

    @property
    def occupancy(self) -> Occupancy:
        """How full the steps were."""
        return self._fair.occupancy


class _Signal:
    """What an engine's thread waits for while it holds nothing of the engine."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.has_work = self.is_ended = False


def _work(engine: weakref.ref[EngineLoop[Any]], signal: _Signal) -> None:
    """Step while there is work, until the engine is gone or the interpreter ends."""
    while True:
        with signal.changed:
            signal.changed.wait_for(lambda: signal.has_work or signal.is_ended)
        loop = engine()
        if loop is None or signal.is_ended:
            return
        loop.step()
        del loop


def _end(thread: threading.Thread, signal: _Signal) -> None:
    with signal.changed:
        signal.is_ended = True
        signal.changed.notify()
    if thread is not threading.current_thread():
        thread.join(END_TIMEOUT_S)
