"""One story that is being made: its events so far, for any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from deployments.stories.events import Numbering, StreamEvent
from deployments.stories.resume import ResumedEngines
from minigpt5.story.state import PageState, StoryBuilder, StoryState
from minigpt5.story.store import StoryStore


class RunningStory:
    """A story under way in this process."""

    def __init__(self, builder: StoryBuilder, engines: ResumedEngines, store: StoryStore, number: int) -> None:
        """`store`: under the lease with this `number`."""
        self.builder, self.engines, self.store, self.number = builder, engines, store, number
        self.id = builder.state().id
        self.numbering = Numbering(self.id)
        self.events: list[StreamEvent] = []
        self.has_ended = False
        """Whether this process has no more work on it."""
        self.is_lost = False
        """Another front has taken it."""
        self.is_stored = True
        """How it ended is stored, or is not known yet."""
        self.is_cancelled = False
        """A client has cancelled it."""
        self._changed = asyncio.Event()

    def add(self, event: StreamEvent | None) -> None:
        """Show an event to the readers."""
        if event:
            self.events.append(event)
            self._wake_readers()

    def end(self, final: StoryState | None) -> None:
        """Show the readers how the story ended, or with None that it does elsewhere."""
        if final:
            self.events.append(self.numbering.end(final))
        self.has_ended = True
        self._wake_readers()

    def page_state(self, index: int) -> PageState:
        return self.engines.drawn.get(index) or self.builder.page_state(index)

    async def follow(self) -> AsyncIterator[StreamEvent]:
        """All events from the first, then the coming ones as they come."""
        position = 0
        while True:
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.has_ended:
                return
            await self._changed.wait()

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
