"""Coroutines behind plain functions, also where an event loop runs already, as in a notebook.

Each call gets a short-lived thread with a loop of its own. The caller's thread meanwhile hears the reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
E = TypeVar("E")

POLL_S = 0.1
"""How often a waiting caller looks whether its task was cancelled."""


class _Mark(enum.Enum):
    """What the queue holds beside reports."""

    LOOK = "a cancellation may have come"
    END = "the coroutine has ended"


def run_blocking(
    start: Callable[[Callable[[E], None]], Coroutine[Any, Any, T]], hear: Callable[[E], None] = lambda event: None
) -> T:
    """Run the coroutine `start(report)` to its end and return its result, or raise its exception.

    `hear` is called in the caller's thread, with each report in its order. Where it raises, or Ctrl-C or a
    cancellation reaches the caller, the coroutine is cancelled and has ended before the exception leaves. The
    coroutine sees the caller's context variables.
    """
    is_cancelled = _watch_cancellation()
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    reports: queue.SimpleQueue[E | _Mark] = queue.SimpleQueue()
    task = loop.create_task(start(reports.put))

    async def finish() -> None:
        while not task.done():
            await asyncio.wait({task}, timeout=POLL_S)
            reports.put(_Mark.LOOK)

    def work() -> None:
        try:
            with runner:
                loop.run_until_complete(finish())
        finally:
            reports.put(_Mark.END)

    thread = threading.Thread(target=work, name="minigpt5", daemon=True)
    thread.start()
    try:
        # No timeout: one that a signal interrupts at its end may last for ever in CPython 3.11.
        while (report := reports.get()) is not _Mark.END:
            if is_cancelled():
                raise asyncio.CancelledError
            if report is not _Mark.LOOK:
                hear(report)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the work has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        raise
    finally:
        thread.join()
        if not task.cancelled():
            task.exception()  # else asyncio logs an exception that another one overtook
    return task.result()


def _watch_cancellation() -> Callable[[], bool]:
    """Tell whether the caller's task, where there is one, is cancelled from now on.

    asyncio.run answers the first Ctrl-C with a cancellation, which a task that waits here cannot notice by itself.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    if task is None:
        return lambda: False
    num_before = task.cancelling()
    return lambda: task.cancelling() > num_before
