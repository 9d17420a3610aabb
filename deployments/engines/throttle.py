"""How often an engine tells of its work: each event between processes costs the cores that the engines need."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from minigpt5.types import DecoderEvent, GeneratorEvent, Progress, TextDelta

TEXT_S = 0.05
"""Readers are shown new text that often."""
PROGRESS_S = 0.15


async def coalesce_text(
    events: AsyncIterator[GeneratorEvent], *, interval_s: float = TEXT_S
) -> AsyncIterator[GeneratorEvent]:
    """Join text that comes sooner than `interval_s` after the last; it goes with the next event at the latest."""
    held: TextDelta | None = None
    sent_at = -interval_s
    async for event in events:
        if isinstance(event, TextDelta):
            if held and held.page == event.page:
                event = TextDelta(page=event.page, text=held.text + event.text)
            elif held:
                yield held
            held = event
            if time.monotonic() - sent_at < interval_s:
                continue
        if held:
            yield held
            held, sent_at = None, time.monotonic()
        if not isinstance(event, TextDelta):
            yield event
    if held:
        yield held


async def throttle_progress(
    events: AsyncIterator[DecoderEvent], *, interval_s: float = PROGRESS_S
) -> AsyncIterator[DecoderEvent]:
    """Leave out steps that come sooner than `interval_s` after the last, but for the first, the last and those with a
    preview."""
    told_at = -interval_s
    async for event in events:
        if isinstance(event, Progress) and event.step < event.steps and event.preview is None:
            if time.monotonic() - told_at < interval_s:
                continue
            told_at = time.monotonic()
        yield event
