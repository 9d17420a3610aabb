"""The stories that run: each is a task of the server, and clients read along from its events.

An accepted story is finished even if nobody listens any more, or this process dies: whatever is announced is stored
before, and whoever starts next goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

from deployments.admission import Admission, Overloaded, Place
from deployments.engines import Engines
from deployments.events import Numbering, Position, StreamEvent, after, join_text, stored_events
from deployments.metrics import StoryTimes
from deployments.replay import Replay
from minigpt5.errors import MiniGPT5Error, StoryNotFound
from minigpt5.flow import describe, stream_story
from minigpt5.store import StoryStore
from minigpt5.story import PageState, StoryBuilder, StoryState, new_story_id
from minigpt5.types import (
    PageDone,
    Picture,
    Progress,
    SlotOpened,
    StoryEvent,
    StoryRequest,
    StoryStarted,
    TextDelta,
    TextRestarted,
)

logger = logging.getLogger("ray.serve")

LOOK_S = 0.5
"""How often a story that runs elsewhere is looked at."""


class StoryBusy(Exception):
    """A story cannot be changed now."""


class KeyTaken(Exception):
    """An Idempotency-Key that another body was sent with."""


class RunningStory:
    """One story's events so far, for any number of readers."""

    def __init__(self, builder: StoryBuilder, replay: Replay) -> None:
        self.builder, self.replay = builder, replay
        self.id = builder.state().id
        self.numbering = Numbering(self.id)
        self.final: StoryState | None = None
        self.is_unwanted = False
        """Somebody has cancelled it."""
        self._events: list[StreamEvent] = []
        self._news = asyncio.Event()

    def publish(self, event: StreamEvent | None, *, final: StoryState | None = None) -> None:
        if event:
            self._events.append(event)
        self.final = final
        self._news.set()
        self._news = asyncio.Event()

    def page_state(self, index: int) -> PageState:
        return self.replay.drawn.get(index) or self.builder.page_state(index)

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
        self._stories: dict[str, RunningStory] = {}
        self._changing: set[str] = set()
        self._once = asyncio.Lock()
        self._times = StoryTimes()

    async def start(self, request: StoryRequest, *, story_id: str = "") -> RunningStory:
        """Raises Overloaded, or InvalidRequest where the generator cannot write it."""
        return await self._start(StoryBuilder(request, story_id=story_id or new_story_id(), model=self._model), ())

    async def start_once(self, request: StoryRequest, key: str, digest: str) -> str:
        """The id of the story that was begun under `key`; where there is none, it is begun now. `digest`: of the body.
        Raises KeyTaken, or as `start` does."""
        name = hashlib.sha256(f"{request.key}\0{key}".encode()).hexdigest()
        async with self._once:
            if known := await asyncio.to_thread(self._store.load_once, name):
                story_id, digest_of_first = known
                if digest_of_first != digest:
                    raise KeyTaken(f"this key has begun {story_id} with another body: send another key")
                with contextlib.suppress(StoryNotFound):  # it was not begun after all, or is deleted
                    await asyncio.to_thread(self._store.load, story_id)
                    return story_id
            story_id = known[0] if known else new_story_id()
            await asyncio.to_thread(self._store.save_once, name, story_id, digest)
            await self.start(request, story_id=story_id)
            return story_id

    async def go_on(
        self, state: StoryState, request: StoryRequest, *, change: Callable[[], None] = lambda: None
    ) -> RunningStory:
        """Run a stored story again, or more of it: what is finished stays. Called by who is `alone` with it. `change`
        is made to what is stored when nothing can refuse the story any more. Raises as `start` does."""
        builder = StoryBuilder(request, story_id=state.id, model=state.model, created=state.created)
        return await self._start(builder, state.pages, change)

    async def take_up(self) -> None:
        """Go on with every story that nobody finished."""
        for story_id in await asyncio.to_thread(self._store.running):
            try:
                with self.alone(story_id):
                    await self._take_up(story_id)
            except StoryBusy:  # somebody is at it already
                continue
            except Exception as failure:  # one story that cannot be gone on with does not stop the others
                logger.error("%s cannot be gone on with: %s", story_id, describe(failure))

    async def _take_up(self, story_id: str) -> None:
        try:
            state = await asyncio.to_thread(self._store.load, story_id)
        except StoryNotFound:  # it was never accepted, or is deleted
            return await asyncio.to_thread(self._store.mark, story_id, is_running=False)
        if state.status != "drawing":  # only the mark was left
            return await asyncio.to_thread(self._store.mark, story_id, is_running=False)
        request = await asyncio.to_thread(self._store.load_request, story_id)
        while True:
            try:
                await self.go_on(state, request)
                return
            except Overloaded as refusal:
                await asyncio.sleep(refusal.retry_after_s)

    @contextlib.contextmanager
    def alone(self, story_id: str) -> Iterator[None]:
        """Change what is stored of a story. Raises StoryBusy while it is being made, or changed by somebody else."""
        if story_id in self._stories or story_id in self._changing:
            raise StoryBusy(f"{story_id} is being worked on: wait for its end, or cancel it")
        self._changing.add(story_id)
        try:
            yield
        finally:
            self._changing.discard(story_id)

    def find(self, story_id: str) -> RunningStory | None:
        """A story that runs here."""
        return self._stories.get(story_id)

    async def follow(self, story_id: str, seen: Position | None) -> AsyncIterator[StreamEvent]:
        """What comes after `seen`, or all, wherever the story runs or ended. Raises StoryNotFound."""
        if story := self.find(story_id):
            events = story.follow()
            async for event in after(events, seen) if seen else events:
                yield event
            return
        while True:
            state = await asyncio.to_thread(self._store.load, story_id)
            events = _each(stored_events(state))
            async for event in after(events, seen) if seen else events:
                seen = event.position
                yield event
            if state.status != "drawing":
                return
            await asyncio.sleep(LOOK_S)

    async def wait(self, story_id: str, seconds: float | None = None) -> None:
        """Until the story has ended, at most so long. Raises StoryNotFound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for _ in self.follow(story_id, None):
                    pass

    async def cancel(self, story_id: str) -> None:
        """Stop a story at the next token and the next denoising step; returns when that is stored."""
        if task := self._tasks.get(story_id):
            if not task.cancelling():  # a second one would interrupt the storing of the first
                self._stories[story_id].is_unwanted = True
                task.cancel()
            await asyncio.wait({task})

    async def _start(
        self, builder: StoryBuilder, pages: tuple[PageState, ...], change: Callable[[], None] = lambda: None
    ) -> RunningStory:
        request, story_id = builder.request, builder.state().id
        place = self._admission.enter(request)
        try:
            await self._engines.check(request)
            story = RunningStory(builder, Replay(self._engines, self._store, story_id, pages))
            await asyncio.to_thread(self._begin, builder, change)
        except BaseException:
            place.leave()
            raise
        # In a context of its own: Serve cancels what a request's context has started when its client is gone.
        task = asyncio.create_task(self._run(story, place), context=contextvars.Context())
        self._tasks[story_id], self._stories[story_id] = task, story
        task.add_done_callback(lambda task: self._forget(story_id))
        return story

    def _begin(self, builder: StoryBuilder, change: Callable[[], None]) -> None:
        state = builder.state()
        self._store.save_request(state.id, builder.request)
        self._store.mark(state.id, is_running=True)
        self._store.save(state)
        change()

    def _forget(self, story_id: str) -> None:
        self._tasks.pop(story_id, None)
        self._stories.pop(story_id, None)

    async def _run(self, story: RunningStory, place: Place) -> None:
        builder, replay, clock = story.builder, story.replay, self._times.start()
        try:
            # Calls of one story go to the replica that has its earlier pages.
            request = dataclasses.replace(builder.request, session=story.id)
            events = stream_story(request, replay.generate, replay.decode, story_id=story.id)
            async with contextlib.aclosing(join_text(events)) as joined:  # type: ignore[type-var]
                async for event in joined:
                    builder.add(event)
                    place.see(event)
                    clock.see(event)
                    await _to_the_end(asyncio.to_thread(self._keep, story, event))
                    story.publish(_announce(story, event))
            await self._end(story, builder.state("done"))
        except asyncio.CancelledError:
            if not story.is_unwanted:  # this process ends: whoever starts next goes on with the story
                raise
            await self._end(story, builder.state("cancelled"))
        except Exception as failure:  # whatever it was, its readers must hear of it
            logger.error("%s failed: %s", story.id, type(getattr(failure, "cause", None) or failure).__name__)
            await self._end(story, builder.state("failed", error=describe(failure)))
        finally:
            place.leave()

    async def _end(self, story: RunningStory, state: StoryState) -> None:
        """Store how a story ended, and its pages as far as they are; tell its readers."""

        def keep() -> StoryState:
            for page in state.pages:
                if state.status != "done" and not page.image and page.index not in story.replay.drawn:
                    self._store.save_page(state.id, page)
            self._store.save(state)
            self._store.mark(state.id, is_running=False)
            return self._store.load(state.id)

        try:
            state = await asyncio.to_thread(keep)
        except (OSError, MiniGPT5Error) as failure:  # the storage may be what failed
            logger.error("%s: how it ended is not stored: %s", story.id, failure)
        story.publish(story.numbering.end(state), final=state)

    def _keep(self, story: RunningStory, event: StoryEvent) -> None:
        """Store what an event announces, but for what was stored before."""
        match event:
            case Picture(page=index) if index not in story.replay.drawn:
                self._store.save_picture(story.id, event)
            case SlotOpened(page=index) if index not in story.replay.drawn:
                self._store.save_page(story.id, story.page_state(index))
            case PageDone() if event.page.index not in story.replay.drawn:
                self._store.save_page(story.id, story.page_state(event.page.index))


def _announce(story: RunningStory, event: StoryEvent) -> StreamEvent | None:
    """What readers see of an event that the builder has taken in; nothing where a later one says it all."""
    numbering = story.numbering
    match event:
        case StoryStarted():
            return numbering.started(event.seed)
        case TextDelta(page=page):
            return numbering.text(page, story.builder.text(page))
        case TextRestarted(page=page):
            return numbering.restart(page)
        case SlotOpened(page=page):
            return numbering.slot(page)
        case Progress():
            return numbering.progress(event)
        case Picture(page=page):
            image = story.page_state(page).image
            assert image
            return numbering.image(page, image)
        case PageDone():
            return numbering.page(story.page_state(event.page.index))
    return None


async def _each(events: list[StreamEvent]) -> AsyncIterator[StreamEvent]:
    for event in events:
        yield event


async def _to_the_end(work: Coroutine[None, None, None]) -> None:
    """What has begun to be stored is stored, though the task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
