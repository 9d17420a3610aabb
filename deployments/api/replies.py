"""A story -> an HTTP reply: whole, as a stream, or where to look later.

Where there are keys, the URLs in a reply are signed: who has one needs no key for what it names, until it expires.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from deployments.api.errors import EVENTS, error_response
from deployments.api.front import Front
from deployments.schemas import StoryReply, story_reply
from deployments.stories.events import StreamEvent

BEGUN: dict[int | str, dict[str, Any]] = {
    **EVENTS,
    202: {"model": StoryReply, "description": "The story has begun, and is at Location"},
}
"""What `answer` replies besides the finished story, for the API's document."""
KEEP_ALIVE_S = 15.0


async def answer(front: Front, story_id: str, *, stream: bool, wait: bool) -> Response:
    """With its events as they come; or with the story at its end; or at once, with 202."""
    if stream:
        return stream_reply(front, front.story_manager.relay.follow(story_id, None))
    path = f"/v1/stories/{story_id}"
    if wait:
        await front.story_manager.relay.wait(story_id)
    state = await asyncio.to_thread(front.store.load, story_id)
    if state.status == "failed":
        message = f"{story_id} failed: {state.error}; what was finished is at {path}"
        return error_response(500, message, code="story_failed", headers={"Location": path})
    return reply(front, story_reply(state), 201 if wait else 202, headers={"Location": path})


def reply(front: Front, content: BaseModel, status: int = 200, *, headers: Mapping[str, str] | None = None) -> Response:
    """Encode a reply as JSON."""
    return JSONResponse(sign_urls(front, content.model_dump(exclude_none=True)), status, headers=dict(headers or {}))


def sign_urls(front: Front, data: Any) -> Any:
    """The same JSON; every "url" in it is signed where there are keys."""
    if not front.keys:
        return data
    if isinstance(data, list):
        return [sign_urls(front, value) for value in data]
    if isinstance(data, dict):
        return {
            key: front.keys.sign_url(value) if key == "url" and isinstance(value, str) else sign_urls(front, value)
            for key, value in data.items()
        }
    return data


def stream_reply(front: Front, events: AsyncIterator[StreamEvent]) -> Response:
    """Server-sent events."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_encode(front, events), media_type="text/event-stream", headers=headers)


async def _encode(front: Front, events: AsyncIterator[StreamEvent]) -> AsyncIterator[str]:
    """Encode events as text, with a comment now and then so that no proxy closes a quiet line."""
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
            yield dataclasses.replace(event, data=sign_urls(front, event.data)).encode()
            arriving = asyncio.ensure_future(anext(events, None))
    finally:
        arriving.cancel()
