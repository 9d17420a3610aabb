"""Pictures while Serve replaces the engines of one model by those of another.

Replicas of both models may run meanwhile. A decoder refuses vokens of another model: the generator that is there then
reads the same text again, until both have one model.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from deployments.engines.handles import UPGRADE_S, Engines
from minigpt5.errors import EngineLost, FingerprintMismatch
from minigpt5.types import DecoderEvent, DrawRequest, StoryRequest, Vokens

logger = logging.getLogger("ray.serve")

UPGRADE_PAUSE_S = 1.0
"""Before both are asked again."""


ReadAgain = Callable[[], Awaitable[Vokens]]
"""The vokens of what is being drawn, by the generator that is there now."""


async def draw_across_models(
    engines: Engines, request: DrawRequest, read_again: ReadAgain
) -> AsyncGenerator[DecoderEvent, None]:
    """Draw as the decoder does. Where it has another model than the vokens, draw what `read_again` returns.

    A reference of another model than the vokens is left out: this one cannot draw that page again. Raises
    FingerprintMismatch where both engines do not have one model within UPGRADE_S."""
    until, refused = time.monotonic() + UPGRADE_S, set[str]()
    while True:
        if request.reference and request.reference.vokens.fingerprint != request.vokens.fingerprint:
            request = dataclasses.replace(request, reference=None)
        try:
            async with contextlib.aclosing(engines.decode(request)) as events:
                async for event in events:
                    yield event
            return
        except FingerprintMismatch as mismatch:
            if time.monotonic() >= until:
                raise
            if not refused:
                logger.info("page %d is read again: %s", request.vokens.page, mismatch)
        refused.add(request.vokens.fingerprint)
        request = dataclasses.replace(request, vokens=await read_again())
        if request.vokens.fingerprint in refused:  # one of the engines is not replaced yet
            await asyncio.sleep(UPGRADE_PAUSE_S)


async def read_page(engines: Engines, request: StoryRequest, texts: tuple[str, ...]) -> Vokens:
    """The vokens of a story's last page, from `texts` of all of its pages: nothing is written.

    Raises FingerprintMismatch where a text is missing or empty."""
    page = len(request.previous) + request.pages
    if len(texts) < request.pages:
        raise FingerprintMismatch(f"page {page} is of another model, and has no text that this one could read")
    return await _vokens(engines, dataclasses.replace(request, given=texts), page)


async def read_caption(engines: Engines, text: str, *, page: int, key: str) -> Vokens:
    """The vokens of a text by itself, as those of this page."""
    request = StoryRequest(prompt=(text,), pages=1, mode="caption", key=key)
    return dataclasses.replace(await _vokens(engines, request, 1), page=page)


async def _vokens(engines: Engines, request: StoryRequest, page: int) -> Vokens:
    async with contextlib.aclosing(engines.generate(request)) as events:
        async for event in events:
            if isinstance(event, Vokens) and event.page == page:
                return event
    raise EngineLost("the generator ended without the page's vokens")
