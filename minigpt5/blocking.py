"""Coroutines behind plain functions, also where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end and return its result, or raise what it raises.

    Where the calling thread runs an event loop, the coroutine gets a loop and a thread of its own; the caller waits.
    Ctrl-C cancels the coroutine, waits until it has let go of everything, and is raised as KeyboardInterrupt.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: Future[T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def main() -> T:
        task = asyncio.current_task()
        assert task
        started.set_result((asyncio.get_running_loop(), task))
        return await work

    def run() -> None:
        try:
            result.set_result(asyncio.run(main()))
        except BaseException as failure:  # the caller raises it
            result.set_exception(failure)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="minigpt5", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        loop, task = started.result()
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    return result.result()
