"""A story -> an HTTP reply: whole, as a stream, or where to look later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.errors import error_response
from deployments.events import StreamEvent
from deployments.front import Front
from deployments.schemas import story_reply

KEEP_ALIVE_S = 15.0


async def answer(front: Front, story_id: str, *, stream: bool, wait: bool) -> Response:
    """With its events as they come; or with the story at its end; or at once, with 202."""
    if stream:
        return stream_reply(front.registry.follow(story_id, None))
    path = f"/v1/stories/{story_id}"
    if wait:
        await front.registry.wait(story_id)
    state = await asyncio.to_thread(front.store.load, story_id)
    if state.status == "failed":
        message = f"{story_id} failed: {state.error}; what was finished is at {path}"
        return error_response(500, message, code="story_failed", headers={"Location": path})
    reply = story_reply(state).model_dump(exclude_none=True)
    return JSONResponse(reply, 201 if wait else 202, headers={"Location": path})


def stream_reply(events: AsyncIterator[StreamEvent]) -> Response:
    """Server-sent events."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_encode(events), media_type="text/event-stream", headers=headers)


async def _encode(events: AsyncIterator[StreamEvent]) -> AsyncIterator[str]:
    """As text, with a comment now and then so that nothing on the way closes a quiet line."""
    arriving = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({arriving}, timeout=KEEP_ALIVE_S)
            if not arriving.done():
                yield ": still here\n\n"
                continue
            event = arriving.result()
            if event is None:
                return
            yield event.encode()
            arriving = asyncio.ensure_future(anext(events, None))
    finally:
        arriving.cancel()
