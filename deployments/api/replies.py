"""A story -> an HTTP reply: whole, as a stream, or where to look later. EventStream sends every stream of the API.

Where there are keys, the URLs in a reply are signed: who has one needs no key for what it names, until it expires.
URLs begin with the `route_prefix` that Serve gives the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from deployments.api.errors import EVENTS, describe_failure, error_response
from deployments.api.front import Front
from deployments.api.paths import public_path
from deployments.schemas import StoryReply, story_reply
from deployments.sse import KEEP_ALIVE, encode
from deployments.stories.events import Position
from deployments.stories.store_threads import reading
from minigpt5.errors import EngineLost
from minigpt5.story.state import StoryState
from minigpt5.story.stream import describe

logger = logging.getLogger("ray.serve")

BEGUN: dict[int | str, dict[str, Any]] = {
    **EVENTS,
    202: {"model": StoryReply, "description": "The story has begun, and is at Location"},
}
"""What `answer` replies besides the finished story, for the API's document."""
RESUMED: dict[int | str, dict[str, Any]] = {**EVENTS, 204: {"description": "The reader has the whole stream"}}
"""What a stream's reader gets who comes back."""
KEEP_ALIVE_S = 8.0
"""A stream is quiet for no longer. Proxies close a quiet connection after 15 to 60 s."""


async def answer(front: Front, begin: Callable[[], Awaitable[str]], *, stream: bool, wait: bool) -> Response:
    """Begin a story, and reply with its events as they come; or with the story at its end; or at once, with 202.

    `begin` returns the story's id."""
    if stream:
        return EventStream(_begin_and_follow(front, begin), error_name="error")
    story_id = await begin()
    path = public_path(f"/v1/stories/{story_id}")
    if wait:
        await front.relay.wait(story_id)
    state = await reading(front.store.load, story_id)
    if state.status == "failed":
        return failure_reply(state)
    return reply(front, story_reply(state), 201 if wait else 202, headers={"Location": path})


def failure_reply(state: StoryState) -> Response:
    path = public_path(f"/v1/stories/{state.id}")
    message = f"{state.id} failed: {state.error}; what was finished is at {path}"
    return error_response(500, message, code="story_failed", headers={"Location": path})


def reply(front: Front, content: BaseModel, status: int = 200, *, headers: Mapping[str, str] | None = None) -> Response:
    """Encode a reply as JSON."""
    return JSONResponse(public_urls(front, content.model_dump(exclude_none=True)), status, headers=dict(headers or {}))


def public_urls(front: Front, data: Any) -> Any:
    """The same JSON; every "url" in it is as a client asks for it."""
    if isinstance(data, list):
        return [public_urls(front, value) for value in data]
    if isinstance(data, dict):
        return {
            key: front.public_url(value) if key == "url" and isinstance(value, str) else public_urls(front, value)
            for key, value in data.items()
        }
    return data


class EventStream(StreamingResponse):
    """Server-sent events as they come, and a comment where none comes for KEEP_ALIVE_S.

    A failure before the first event or comment is raised, and becomes a reply with its status. A later one becomes the
    last event, whose data is {"error": ...} with the object of that reply. One task reads the events. It is cancelled
    when the client goes away, and closes them.
    """

    def __init__(self, events: AsyncGenerator[str], *, error_name: str = "") -> None:
        """`events`: encoded (`deployments.sse.encode`). `error_name`: name of the event that tells of a failure."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._error_name = events, error_name
        self._arrived: asyncio.Queue[str | None] = asyncio.Queue()
        """The event that was read last, or None at the end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reading = asyncio.create_task(self._read())
        reading.add_done_callback(lambda _: self._arrived.put_nowait(None))
        try:
            first = await self._next(reading)
            self.body_iterator = self._parts(Request(scope), reading, first)
            await super().__call__(scope, receive, send)
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(self) -> None:
        """Read an event when the one before has been taken: a slow client slows the work down."""
        async with contextlib.aclosing(self._events):
            async for event in self._events:
                self._arrived.put_nowait(event)
                await self._arrived.join()

    async def _next(self, reading: asyncio.Task[None]) -> str | None:
        """The next event, or a comment where it does not come; None at the end. Raises what reading raised."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                event = await self._arrived.get()
        except TimeoutError:
            return KEEP_ALIVE
        self._arrived.task_done()
        if event is None and reading.cancelled():  # not by this reply, which asks no more then
            raise EngineLost("the work was cancelled at an engine")
        if event is None:
            reading.result()
        return event

    async def _parts(self, request: Request, reading: asyncio.Task[None], part: str | None) -> AsyncGenerator[str]:
        """The body, from its first `part`."""
        try:
            while part is not None:
                yield part
                part = await self._next(reading)
        except Exception as failure:
            yield encode({"error": await describe_failure(request, failure)}, name=self._error_name)


async def _begin_and_follow(front: Front, begin: Callable[[], Awaitable[str]]) -> AsyncGenerator[str]:
    story_id = await begin()
    async with contextlib.aclosing(follow(front, story_id, None)) as events:
        async for event in events:
            yield event


async def follow(front: Front, story_id: str, seen: Position | None) -> AsyncGenerator[str]:
    """Yield a story's events, encoded, after the one at `seen`.

    The story goes on at the server where this fails: the stream then ends without `done` and without `error`, and its
    reader comes back."""
    try:
        async with contextlib.aclosing(front.relay.follow(story_id, seen)) as events:
            async for event in events:
                yield dataclasses.replace(event, data=public_urls(front, event.data)).encode()
    except Exception as failure:
        logger.warning("a stream of %s is cut off: %s", story_id, describe(failure), extra={"story_id": story_id})
