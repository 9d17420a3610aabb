"""Events of stories between fronts: a reader follows a story here, at whichever front it runs."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, Callable

from deployments.stories.events import ENDS, Position, StreamEvent, after, stored_events
from deployments.stories.ledger import Ledger
from deployments.stories.running_story import RunningStory
from deployments.stories.store_threads import reading
from minigpt5.story.store import StoryStore

POLL_S = 0.1
"""How often another front's story is asked for new events, and this front's are passed on."""
RETRY_S = 0.5
"""How often a story that no front runs at present is looked at."""


class EventRelay:
    """Publishes the events of this front's stories to other fronts, and follows any story wherever it runs."""

    def __init__(self, ledger: Ledger, store: StoryStore, find: Callable[[str], RunningStory | None]) -> None:
        """`find`: a story that runs here, by its id."""
        self._ledger, self._store, self._find = ledger, store, find
        self._publishing: dict[str, asyncio.Task[None]] = {}

    def publish(self, story: RunningStory) -> None:
        """Send a story's events to the ledger for as long as another front has a reader."""
        if story.id not in self._publishing:
            task = asyncio.create_task(self._publish(story), context=contextvars.Context())
            self._publishing[story.id] = task
            task.add_done_callback(lambda task: self._publishing.pop(story.id, None))

    async def _publish(self, story: RunningStory) -> None:
        start = 0
        while True:
            events = story.events[start:]
            if not await self._ledger.publish(story.id, story.number, start, events):
                return
            start += len(events)
            if story.has_ended and start == len(story.events):
                return
            await asyncio.sleep(POLL_S)

    async def follow(self, story_id: str, seen: Position | None) -> AsyncGenerator[StreamEvent]:
        """What comes after `seen`, or all, wherever the story runs or ended. Raises StoryNotFound."""
        while True:
            events = self._events_of(story_id)
            name = ""
            async with contextlib.aclosing(events):
                async for event in after(events, seen) if seen else events:
                    seen, name = event.position, event.name
                    yield event
            if name in ENDS:
                return
            await asyncio.sleep(RETRY_S)

    async def wait(self, story_id: str, seconds: float | None = None) -> None:
        """Return when the story has ended, or after `seconds`. Raises StoryNotFound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for _ in self.follow(story_id, None):
                    pass

    async def _events_of(self, story_id: str) -> AsyncGenerator[StreamEvent]:
        """A story's events from the first, to its end or until its owner is another one."""
        if story := self._find(story_id):
            async for event in story.follow():
                yield event
            return
        state = await reading(self._store.load, story_id)
        part = await self._ledger.read(story_id, 0) if state.status == "drawing" else None
        if part is None:  # it has ended, or no front runs it at present
            for event in stored_events(state):
                yield event
            return
        number, start = part.number, 0
        while part and part.number == number:
            for event in part.events:
                yield event
                if event.name in ENDS:
                    return
            start += len(part.events)
            await asyncio.sleep(POLL_S)
            part = await self._ledger.read(story_id, start)
