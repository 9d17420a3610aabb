"""Work that is finished although its task is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


async def uninterrupted(work: Coroutine[object, object, object]) -> None:
    """Await `work` to its end, then raise CancelledError where the calling task was cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
