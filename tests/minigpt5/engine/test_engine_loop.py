"""The thread under both engines, with an engine that only counts."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import weakref

import pytest

from minigpt5.engine.engine_loop import EngineLoop, Job
from minigpt5.errors import EngineFull


class Count(Job[int]):
    """Counts to `goal`, one number a step."""

    def __init__(self, goal: int) -> None:
        super().__init__(key="", cost=goal)
        self.goal, self.num = goal, 0


class Counter:
    def __init__(self, *, step_s: float = 0.0, max_jobs: int = 100) -> None:
        self.step_s, self.left = step_s, 0
        self.loop = EngineLoop[Count](
            "counter", choose=self.choose, advance=self.advance, leave=self.leave, max_jobs=max_jobs
        )

    def choose(self, jobs: list[Count]) -> list[Count]:
        if any(job.goal == 13 for job in jobs):
            raise RuntimeError("thirteen")
        return jobs[:2]

    def advance(self, jobs: list[Count]) -> None:
        time.sleep(self.step_s)
        for job in jobs:
            job.is_started = True
            job.num += 1
            job.cost -= 1
            job.put(job.num)
            job.is_done = job.num == job.goal

    def leave(self, job: Count) -> None:
        self.left += 1
        if job.goal == 7:
            raise RuntimeError("seven")

    async def count(self, goal: int) -> list[int]:
        return [num async for num in self.loop.run(Count(goal))]


def test_jobs_share_steps_and_each_hears_its_own_events() -> None:
    counter = Counter()

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(counter.count(goal) for goal in (1, 5, 3, 2)))

    assert asyncio.run(together()) == [list(range(1, goal + 1)) for goal in (1, 5, 3, 2)]
    assert counter.left == 4
    assert counter.loop.num_running == counter.loop.num_waiting == counter.loop.queued_cost == 0


def test_gauges_tell_what_runs_what_waits_and_what_is_left() -> None:
    counter = Counter(step_s=0.02)

    async def look() -> tuple[int, int, float]:
        tasks = [asyncio.create_task(counter.count(50)) for _ in range(5)]
        await asyncio.sleep(0.1)
        seen = counter.loop.num_running, counter.loop.num_waiting, counter.loop.queued_cost
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return seen

    num_running, num_waiting, cost = asyncio.run(look())
    assert (num_running, num_waiting) == (2, 3)
    assert 150 < cost < 250


def test_a_failed_step_fails_who_is_there_and_nobody_after() -> None:
    counter = Counter()
    with pytest.raises(RuntimeError, match="thirteen"):
        asyncio.run(counter.count(13))
    assert asyncio.run(counter.count(2)) == [1, 2]


def test_a_job_that_cannot_be_let_go_fails_alone() -> None:
    counter = Counter()

    async def together() -> list[list[int] | BaseException]:
        return await asyncio.gather(*(counter.count(goal) for goal in (7, 9)), return_exceptions=True)

    failure, counted = asyncio.run(asyncio.wait_for(together(), 20))
    assert str(failure) == "seven" and counted == list(range(1, 10))
    assert asyncio.run(counter.count(2)) == [1, 2]
    assert counter.loop.num_running == 0


def test_a_full_engine_refuses_and_takes_again_when_there_is_room() -> None:
    counter = Counter(step_s=0.01, max_jobs=1)

    async def twice() -> None:
        first = asyncio.create_task(counter.count(5))
        await asyncio.sleep(0.02)
        with pytest.raises(EngineFull, match="counter takes at most 1"):
            await counter.count(1)
        await first
        assert await counter.count(1) == [1]

    asyncio.run(twice())


def test_the_thread_of_an_engine_that_is_gone_ends() -> None:
    counter = Counter()
    asyncio.run(counter.count(2))
    thread, gone = counter.loop._thread, weakref.ref(counter)
    assert thread and thread.is_alive()
    del counter
    for _ in range(200):  # the thread may be in the middle of a step, and holds the engine for so long
        gc.collect()
        if gone() is None and not thread.is_alive():
            return
        time.sleep(0.02)
    raise AssertionError((gone(), thread))


def test_a_process_that_ends_in_the_middle_of_a_step_waits_for_its_end() -> None:
    code = """
import asyncio, time
from tests.minigpt5.engine.test_engine_loop import Count, Counter

class Slow(Counter):
    def advance(self, jobs):
        super().advance(jobs)
        time.sleep(0.5)
        print("step done", flush=True)

async def leave():
    async for _ in counter.loop.run(Count(100)):
        break

counter = Slow()
asyncio.run(leave())
print("bye", flush=True)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n") == ["bye", "step done", ""]
