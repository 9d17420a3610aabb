"""Story events -> the events of a stream: named, with a position as id and JSON as data.

An event's id says how much of the story its reader has with it. A stream can therefore resume from any source: the
events of a running story, or what is stored of it (`after`).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from deployments.schemas import page_reply, picture_url, story_reply
from deployments.sse import encode
from minigpt5.story.state import ImageState, PageState, StoryState
from minigpt5.types import Progress

ENDS = ("done", "error")
"""The events after which nothing comes."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """What an event is, and how much of the story its reader has with it.

    Example: Position(page=1, kind="image", offset=0, text_page=2, num_characters=14, text_hash="a1b2c3", done=0)
    """

    page: int
    kind: str
    offset: int
    """For a text: characters of the page up to and with this one. For a progress: the step."""
    text_page: int = 1
    """The page whose text is being read: all of the earlier ones is there."""
    num_characters: int = 0
    """Characters of that page's text."""
    text_hash: str = ""
    """Hash of those characters: a text that was written again may be another one."""
    done: int = 0
    """Bit n - 1 is set where page n is finished."""

    def __str__(self) -> str:
        text = f"{self.text_page}-{self.num_characters}-{self.text_hash or 0}"
        return f"{self.page}-{self.kind}-{self.offset}.{text}.{self.done:x}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Raises ValueError."""
        match = _POSITION.fullmatch(text)
        if not match:
            raise ValueError(f"{text[:60]!r} is no event id: send back the id of the last event as it came")
        page, kind, offset, text_page, num_characters, text_hash, done = match.groups()
        return cls(
            page=int(page),
            kind=kind,
            offset=int(offset),
            text_page=int(text_page),
            num_characters=int(num_characters),
            text_hash="" if text_hash == "0" else text_hash,
            done=int(done, 16),
        )


_POSITION = re.compile(
    r"(\d{1,4})-([a-z]{1,10})-(\d{1,9})\.(\d{1,4})-(\d{1,9})-(0|[0-9a-f]{6})\.([0-9a-f]{1,64})", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """One server-sent event."""

    position: Position
    data: dict[str, Any]

    @property
    def name(self) -> str:
        return self.position.kind

    @property
    def page(self) -> int:
        return self.position.page

    def encode(self) -> str:
        return encode(self.data, name=self.name, id=str(self.position))


class Numbering:
    """The stream's events of one story, one after another, each with its position."""

    def __init__(self, story_id: str) -> None:
        self.story_id = story_id
        self._text_page, self._text, self._done = 1, "", 0

    def started(self, seed: int) -> StreamEvent:
        return self._event(0, "story", 0, {"id": self.story_id, "seed": seed})

    def text(self, page: int, text: str) -> StreamEvent | None:
        """`text` is all of the page's so far; nothing where it shows nothing new. White space at either end is none
        of a page's text."""
        if page != self._text_page:
            self._text_page, self._text = page, ""
        text = text.strip()
        delta, self._text = text[len(self._text) :], text
        return self._event(page, "text", len(text), {"page": page, "delta": delta}) if delta else None

    def restart(self, page: int) -> StreamEvent:
        """The page's text so far is void."""
        self._text_page, self._text = page, ""
        return self._event(page, "restart", 0, {"page": page})

    def slot(self, page: int) -> StreamEvent:
        self._text_page, self._text = page + 1, ""
        return self._event(page, "slot", 0, {"page": page})

    def progress(self, event: Progress) -> StreamEvent:
        preview = {} if event.preview is None else {"preview": base64.b64encode(event.preview).decode()}
        data = {"page": event.page, "step": event.step, "steps": event.steps, **preview}
        return self._event(event.page, "progress", event.step, data)

    def image(self, page: int, image: ImageState) -> StreamEvent:
        data = {"page": page, "url": picture_url(self.story_id, page), "width": image.width, "height": image.height}
        return self._event(page, "image", 0, {**data, "seed": image.seed})

    def page(self, page: PageState) -> StreamEvent:
        self._done |= 1 << (page.index - 1)
        reply = page_reply(self.story_id, page)
        return self._event(page.index, "page", 0, reply.model_dump(exclude_none=True))

    def end(self, state: StoryState) -> StreamEvent:
        """The last one: done, or error."""
        if state.status == "failed":
            error = {"message": state.error, "type": "server_error", "param": None, "code": "story_failed"}
            return self._event(state.num_pages, "error", 0, {"error": error, "id": state.id})
        return self._event(state.num_pages, "done", 0, story_reply(state).model_dump(exclude_none=True))

    def _event(self, page: int, kind: str, offset: int, data: dict[str, Any]) -> StreamEvent:
        position = Position(
            page=page,
            kind=kind,
            offset=offset,
            text_page=self._text_page,
            num_characters=len(self._text),
            text_hash=hash_text(self._text) if self._text else "",
            done=self._done,
        )
        return StreamEvent(position=position, data=data)


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def stored_events(state: StoryState) -> list[StreamEvent]:
    """The stream of a story as far as it is stored."""
    numbering = Numbering(state.id)
    events = [numbering.started(state.seed)]
    for page in state.pages:
        if text := numbering.text(page.index, page.text):
            events.append(text)
        if page.image or page.error or any(later.index > page.index for later in state.pages):
            events.append(numbering.slot(page.index))
        if page.image:
            events.append(numbering.image(page.index, page.image))
        if page.image or page.error or (page.is_written and state.status == "done"):
            events.append(numbering.page(page))
    return events if state.status == "drawing" else [*events, numbering.end(state)]


async def has_ended_for(state: StoryState, seen: Position) -> bool:
    """Whether a reader at `seen` was told how the story ended, and there is nothing that he does not have."""
    if state.status == "drawing" or seen.kind not in ENDS:
        return False

    async def stored() -> AsyncGenerator[StreamEvent, None]:
        for event in stored_events(state):
            yield event

    return [event.name async for event in after(stored(), seen)] == [seen.kind]


async def after(events: AsyncIterator[StreamEvent], seen: Position) -> AsyncGenerator[StreamEvent, None]:
    """Yield the events that a reader at `seen` does not have. A page whose text is another one now starts over, after a
    `restart`. The position of every yielded event is at least `seen`."""
    withheld, is_settled = "", not seen.num_characters
    async for event in events:
        page, name = event.page, event.name
        is_read = page < seen.text_page
        if page == seen.text_page and not is_settled:
            if name == "restart":
                withheld = ""
                continue
            if name == "text":
                withheld += event.data["delta"]
            # The text may have ended before it is as long as what was seen: then it is another one.
            if (name == "text" and len(withheld) >= seen.num_characters) or name == "slot":
                is_settled = True
                beginning, rest = withheld[: seen.num_characters], withheld[seen.num_characters :]
                if len(beginning) < seen.num_characters or hash_text(beginning) != seen.text_hash:
                    seen = dataclasses.replace(seen, num_characters=0, text_hash="")
                    yield _beyond(seen, _as(event, "restart", {"page": page}))
                    rest = withheld
                if rest:
                    yield _beyond(seen, _as(event, "text", {"page": page, "delta": rest}))
                if name == "text":
                    continue
        if name == "story" or (is_read and name in ("text", "slot", "restart")):
            continue
        if name in ("text", "restart") and page == seen.text_page and not is_settled:
            continue
        if name in ("progress", "image", "page") and seen.done >> (page - 1) & 1:
            continue
        if name == "progress" and (page, name) == (seen.page, seen.kind) and event.position.offset <= seen.offset:
            continue
        if name == "restart" and page == seen.text_page:
            seen = dataclasses.replace(seen, num_characters=0, text_hash="")
        yield _beyond(seen, event)


def _beyond(seen: Position, event: StreamEvent) -> StreamEvent:
    """The event for a reader who has `seen` as well: a picture may be told after later text."""
    position = dataclasses.replace(event.position, done=event.position.done | seen.done)
    if (position.text_page, position.num_characters) < (seen.text_page, seen.num_characters):
        position = dataclasses.replace(
            position, text_page=seen.text_page, num_characters=seen.num_characters, text_hash=seen.text_hash
        )
    return StreamEvent(position=position, data=event.data)


def _as(event: StreamEvent, kind: str, data: dict[str, Any]) -> StreamEvent:
    """Another event in the place of this one, before which it comes."""
    position = event.position
    if kind == "restart":  # nothing of the page's text is there
        position = dataclasses.replace(position, text_page=event.page, num_characters=0, text_hash="")
    elif event.name == "slot":  # all of the text, and not yet the slot
        text = data["delta"]
        position = dataclasses.replace(
            position, text_page=event.page, num_characters=len(text), text_hash=hash_text(text)
        )
    return StreamEvent(position=dataclasses.replace(position, kind=kind), data=data)
