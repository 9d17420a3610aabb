"""Rate limits for engine events, which cost CPU time at each process boundary."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from minigpt5.types import DecoderEvent, GeneratorEvent, Progress, TextDelta

TEXT_INTERVAL_S = 0.1
"""Minimum time between two pieces of a page's text, and the longest that one is held."""
TEXTS_PER_S = 50.0
"""Pieces of text a second of all requests of an engine together, down to LONGEST_INTERVAL_S."""
LONGEST_INTERVAL_S = 0.5
PROGRESS_INTERVAL_S = 0.15
"""Minimum time between two Progress events of a picture."""


def text_interval_s(num_running: int) -> float:
    """Minimum time between two pieces of text while so many requests run: many of them write slowly, each."""
    return min(LONGEST_INTERVAL_S, max(TEXT_INTERVAL_S, num_running / TEXTS_PER_S))


async def coalesce_text(
    events: AsyncIterator[GeneratorEvent], *, interval_s: Callable[[], float] = lambda: TEXT_INTERVAL_S
) -> AsyncGenerator[GeneratorEvent, None]:
    """Join text that comes sooner than `interval_s` after the last one sent. Held text is sent when the interval is
    over, or before the next event that is not text of its page."""
    clock = asyncio.get_running_loop().time
    held: TextDelta | None = None
    send_at = -math.inf
    arriving = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            if held and clock() >= send_at:
                yield held
                held, send_at = None, clock() + interval_s()
            await asyncio.wait({arriving}, timeout=send_at - clock() if held else None)
            if not arriving.done():  # the time of the held text has come
                continue
            event = arriving.result()
            if isinstance(event, TextDelta) and held and event.page == held.page:
                held = TextDelta(page=held.page, text=held.text + event.text)
            else:
                if held:
                    yield held
                    held, send_at = None, clock() + interval_s()
                if event is None:
                    return
                if isinstance(event, TextDelta):
                    held = event
                else:
                    yield event
            arriving = asyncio.ensure_future(anext(events, None))
    finally:
        arriving.cancel()
        await asyncio.gather(arriving, return_exceptions=True)  # else `events` could not be closed


async def throttle_progress(
    events: AsyncIterator[DecoderEvent], *, interval_s: float = PROGRESS_INTERVAL_S
) -> AsyncGenerator[DecoderEvent, None]:
    """Drop Progress events within `interval_s` of the last one sent. The first, the last and previews always pass."""
    sent_at = -math.inf
    async for event in events:
        if isinstance(event, Progress) and event.step < event.steps and event.preview is None:
            if time.monotonic() - sent_at < interval_s:
                continue
            sent_at = time.monotonic()
        yield event
