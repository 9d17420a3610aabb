"""Threads for the store: a reader never waits behind a writer, who may wait long for a store that fails.

Stories that are made write, and read what they own with the same patience: both are `writing`. All else is `reading`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 32
"""Of each kind. They wait for the store most of their time."""
_READERS = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store reader")
_WRITERS = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store writer")


async def reading(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do a client's read, which ends at once where the store fails."""
    return await _run(_READERS, functools.partial(call, *args, **kwargs))


async def writing(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do what waits for a store that fails: a write, or a read of a story's owner."""
    return await _run(_WRITERS, functools.partial(call, *args, **kwargs))


async def _run(threads: Executor, call: Callable[[], T]) -> T:
    context = contextvars.copy_context()  # as asyncio.to_thread does: logs name the story
    return await asyncio.get_running_loop().run_in_executor(threads, context.run, call)
