"""The stories that run: each is a task of the server, and clients read along from its events.

An accepted story is finished even if nobody listens any more. Whatever is announced is stored before.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
from collections.abc import AsyncIterator, Coroutine

from deployments.admission import Admission, Place
from deployments.client import Engines
from deployments.events import StreamEvent, done_event, error_event, join_text, to_stream_event
from deployments.metrics import StoryTimes
from minigpt5.errors import MiniGPT5Error
from minigpt5.flow import Generate, describe, stream_story
from minigpt5.store import StoryStore
from minigpt5.story import StoryBuilder, StoryState, new_story_id
from minigpt5.types import GeneratorEvent, PageDone, Picture, SlotOpened, StoryEvent, StoryRequest, Vokens

logger = logging.getLogger("ray.serve")


class RunningStory:
    """One story's events so far, for any number of readers."""

    def __init__(self, builder: StoryBuilder) -> None:
        self.builder = builder
        self.id = builder.state().id
        self.final: StoryState | None = None
        self._events: list[StreamEvent] = []
        self._news = asyncio.Event()

    def publish(self, event: StreamEvent | None, *, final: StoryState | None = None) -> None:
        if event:
            self._events.append(event)
        self.final = final
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self) -> AsyncIterator[StreamEvent]:
        """All events from the first, then the coming ones as they come."""
        position = 0
        while True:
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if self.final:
                return
            await self._news.wait()

    async def finish(self) -> StoryState:
        async for _ in self.follow():
            pass
        assert self.final
        return self.final


class Registry:
    """Starts stories and owns them until their end."""

    def __init__(self, engines: Engines, store: StoryStore, admission: Admission, *, model: str) -> None:
        self._engines, self._store, self._admission, self._model = engines, store, admission, model
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._times = StoryTimes()

    async def start(self, request: StoryRequest) -> RunningStory:
        """Raises Overloaded, or InvalidRequest where the generator cannot write it."""
        place = self._admission.enter(request)
        try:
            await self._engines.check(request)
            story = RunningStory(StoryBuilder(request, story_id=new_story_id(), model=self._model))
            await asyncio.to_thread(self._store.save, story.builder.state())
        except BaseException:
            place.leave()
            raise
        # In a context of its own: Serve cancels what a request's context has started when its client is gone.
        task = asyncio.create_task(self._run(story, place), context=contextvars.Context())
        self._tasks[story.id] = task
        task.add_done_callback(lambda task: self._tasks.pop(story.id, None))
        return story

    async def cancel(self, story_id: str) -> None:
        """Stop a story at the next token and the next denoising step; returns when that is stored."""
        if task := self._tasks.get(story_id):
            if not task.cancelling():  # a second one would interrupt the storing of the first
                task.cancel()
            await asyncio.wait({task})

    async def _run(self, story: RunningStory, place: Place) -> None:
        builder, clock = story.builder, self._times.start()
        try:
            # Calls of one story go to the replica that has its earlier pages.
            request = dataclasses.replace(builder.request, session=story.id)
            events = stream_story(request, self._keeping_vokens(story.id), self._engines.decode, story_id=story.id)
            async with contextlib.aclosing(join_text(events)) as joined:  # type: ignore[type-var]
                async for event in joined:
                    builder.add(event)
                    place.see(event)
                    clock.see(event)
                    await _to_the_end(asyncio.to_thread(self._keep, builder, story.id, event))
                    story.publish(to_stream_event(event, builder))
            state = builder.state("done")
            await asyncio.to_thread(self._store.save, state)
            story.publish(done_event(state), final=state)
        except asyncio.CancelledError:
            state = builder.state("cancelled")
            await self._keep_end(state)
            story.publish(done_event(state), final=state)
        except Exception as failure:  # whatever it was, its readers must hear of it
            logger.error("%s failed: %s", story.id, type(getattr(failure, "cause", None) or failure).__name__)
            state = builder.state("failed", error=describe(failure))
            await self._keep_end(state)
            story.publish(error_event(state), final=state)
        finally:
            place.leave()

    async def _keep_end(self, state: StoryState) -> None:
        """Store how a story ended that was not finished, and its pages as far as they are."""

        def keep() -> None:
            for page in state.pages:
                self._store.save_page(state.id, page)
            self._store.save(state)

        with contextlib.suppress(OSError, MiniGPT5Error):  # the storage may be what failed
            await asyncio.to_thread(keep)

    def _keeping_vokens(self, story_id: str) -> Generate:
        async def generate(request: StoryRequest) -> AsyncIterator[GeneratorEvent]:
            async with contextlib.aclosing(self._engines.generate(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Vokens):
                        await asyncio.to_thread(self._store.save_vokens, story_id, event)
                    yield event

        return generate

    def _keep(self, builder: StoryBuilder, story_id: str, event: StoryEvent) -> None:
        """Store what an event announces."""
        match event:
            case Picture():
                self._store.save_picture(story_id, event)
            case SlotOpened(page=index):
                self._store.save_page(story_id, builder.page_state(index))
            case PageDone():
                self._store.save_page(story_id, builder.page_state(event.page.index))


async def _to_the_end(work: Coroutine[None, None, None]) -> None:
    """What has begun to be stored is stored, though the task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
