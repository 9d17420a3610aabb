"""One story that is being made: its events so far for any number of readers, and what is stored of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable

from deployments.stories.events import Numbering, StreamEvent
from deployments.stories.leases import Lease
from deployments.stories.resume import ResumedEngines
from minigpt5.story.state import PageState, StoryBuilder, StoryState
from minigpt5.types import (
    PageDone,
    Picture,
    Progress,
    SlotOpened,
    StoryEvent,
    StoryStarted,
    TextDelta,
    TextReset,
)

STORED = (Picture, SlotOpened, PageDone)
"""The events that announce something to store."""


class RunningStory:
    """A story under way in this process."""

    def __init__(self, builder: StoryBuilder, engines: ResumedEngines, lease: Lease) -> None:
        self.builder, self.engines, self.lease, self.store = builder, engines, lease, lease.store
        self.id, self.number = lease.name, lease.number
        self.numbering = Numbering(self.id)
        self.events: list[StreamEvent] = []
        self.has_ended = False
        """Whether this process has no more work on it."""
        self.is_lost = False
        """Another front has taken it."""
        self.is_stored = True
        """The storage has taken what it was given."""
        self.is_cancelled = False
        """A client has cancelled it."""
        self._changed = asyncio.Event()

    def announce(self, event: StoryEvent) -> None:
        """Show the readers an event that the builder has taken in."""
        if told := self._told(event):
            self.events.append(told)
            self._wake_readers()

    def end(self, final: StoryState | None) -> None:
        """Show the readers how the story ended, or with None that it does elsewhere."""
        if final:
            self.events.append(self.numbering.end(final))
        self.has_ended = True
        self._wake_readers()

    def page_state(self, index: int) -> PageState:
        if index in self.engines.drawn:
            return self.engines.drawn[index]
        page = self.builder.page_state(index)
        image = page.image and dataclasses.replace(page.image, fingerprint=self.engines.drawers.get(index, ""))
        return dataclasses.replace(
            page,
            image=image,
            fingerprint=self.engines.writers.get(index, ""),
            engine=self.engines.writing_engines.get(index, ""),
        )

    async def follow(self) -> AsyncGenerator[StreamEvent, None]:
        """All events from the first, then the coming ones as they come."""
        position = 0
        while True:
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.has_ended:
                return
            await self._changed.wait()

    # These three wait for the store, and run in a thread of their own.

    def keep_request(self, change: Callable[[], None]) -> None:
        """Store what was asked for, before anybody is told that it was accepted; then make the `change`."""
        state = self.builder.state()
        self.store.mark(self.id, is_running=True)
        self.store.save_request(self.id, self.builder.request)
        self.store.save(state)
        change()

    def keep(self, event: StoryEvent) -> None:
        """Store what an event announces, but for what was stored before."""
        match event:
            case Picture(page=index) if index not in self.engines.drawn:
                self.store.save_picture(self.id, event)
            case SlotOpened(page=index) if index not in self.engines.drawn:
                self.store.save_page(self.id, self.page_state(index))
            case PageDone() if event.page.index not in self.engines.drawn:
                self.store.save_page(self.id, self.page_state(event.page.index))

    def keep_end(self, state: StoryState) -> StoryState:
        """Store how the story ended, and its pages as far as they are. Returns what the store has of it then."""
        for page in state.pages:
            if state.status != "done" and not page.image and page.index not in self.engines.drawn:
                self.store.save_page(state.id, self.page_state(page.index))
        self.store.save(state)
        ended = self.store.load(state.id)
        self.store.mark(state.id, is_running=False)
        return ended

    def _told(self, event: StoryEvent) -> StreamEvent | None:
        """What readers see of an event; nothing where a later one says it all."""
        numbering = self.numbering
        match event:
            case StoryStarted():
                return numbering.started(event.seed)
            case TextDelta(page=page):
                return numbering.text(page, self.builder.text(page))
            case TextReset(page=page):
                return numbering.restart(page)
            case SlotOpened(page=page):
                return numbering.slot(page)
            case Progress():
                return numbering.progress(event)
            case Picture(page=page):
                image = self.page_state(page).image
                assert image
                return numbering.image(page, image)
            case PageDone():
                return numbering.page(self.page_state(event.page.index))
        return None

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
