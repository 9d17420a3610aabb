"""Story events -> the events of a stream: named, with a position as id and JSON as data."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from deployments.schemas import page_reply, picture_url, story_reply
from minigpt5.story import StoryBuilder, StoryState
from minigpt5.types import (
    PageDone,
    Picture,
    Progress,
    SlotOpened,
    StoryEvent,
    StoryStarted,
    TextDelta,
)

TEXT_INTERVAL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """One server-sent event.

    Example: StreamEvent(id="1-text-14", name="text", data='{"page": 1, "delta": "Once"}')
    """

    id: str
    """page-kind-offset. Of a text: characters of the page up to and with this one."""
    name: str
    data: str

    def encode(self) -> str:
        return f"id: {self.id}\nevent: {self.name}\ndata: {self.data}\n\n"


async def join_text(
    events: AsyncIterator[StoryEvent], *, interval_s: float = TEXT_INTERVAL_S
) -> AsyncIterator[StoryEvent]:
    """Join text deltas so that two are at least `interval_s` apart. Nothing else waits but the slot after a text."""
    clock = asyncio.get_running_loop().time
    held: TextDelta | None = None
    send_at = clock()
    arriving = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            timeout_s = max(0.0, send_at - clock()) if held else None
            is_here, _ = await asyncio.wait({arriving}, timeout=timeout_s)
            if held and not is_here:
                yield held
                held, send_at = None, clock() + interval_s
                continue
            event = arriving.result()
            if held and isinstance(event, TextDelta) and event.page == held.page:
                held = TextDelta(page=held.page, text=held.text + event.text)
            else:
                if held and (event is None or isinstance(event, TextDelta | SlotOpened)):
                    await asyncio.sleep(max(0.0, send_at - clock()))
                    yield held
                    held, send_at = None, clock() + interval_s
                if event is None:
                    return
                if isinstance(event, TextDelta):
                    held = event
                else:
                    yield event
            arriving = asyncio.ensure_future(anext(events, None))
    finally:
        arriving.cancel()
        await asyncio.wait({arriving})
        if isinstance(events, AsyncGenerator):  # it may have been between two events, with work under way
            await events.aclose()


def to_stream_event(event: StoryEvent, builder: StoryBuilder) -> StreamEvent | None:
    """What a client sees of an event that `builder` has taken in; nothing where a later one says it all."""
    story_id = builder.state().id
    match event:
        case StoryStarted():
            return _stream_event(0, "story", 0, {"id": story_id, "seed": event.seed})
        case TextDelta(page=page):
            return _stream_event(page, "text", builder.num_characters(page), {"page": page, "delta": event.text})
        case SlotOpened(page=page):
            return _stream_event(page, "slot", 0, {"page": page})
        case Progress(page=page, step=step):
            preview = {} if event.preview is None else {"preview": base64.b64encode(event.preview).decode()}
            return _stream_event(page, "progress", step, {"page": page, "step": step, "steps": event.steps, **preview})
        case Picture(page=page):
            image = {"url": picture_url(story_id, page), "width": event.width, "height": event.height}
            return _stream_event(page, "image", 0, {"page": page, **image, "seed": event.seed})
        case PageDone():
            index = event.page.index
            reply = page_reply(story_id, builder.page_state(index))
            return StreamEvent(id=f"{index}-page-0", name="page", data=reply.model_dump_json(exclude_none=True))
    return None


def done_event(state: StoryState) -> StreamEvent:
    data = story_reply(state).model_dump_json(exclude_none=True)
    return StreamEvent(id=f"{state.num_pages}-done-0", name="done", data=data)


def error_event(state: StoryState) -> StreamEvent:
    error = {"message": state.error, "type": "server_error", "param": None, "code": "story_failed"}
    return _stream_event(state.num_pages, "error", 0, {"error": error, "id": state.id})


def _stream_event(page: int, name: str, offset: int, data: dict[str, object]) -> StreamEvent:
    return StreamEvent(id=f"{page}-{name}-{offset}", name=name, data=json.dumps(data, ensure_ascii=False))
