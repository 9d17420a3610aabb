"""The stories that run: each is a task of the server, and clients read along from its events.

An accepted story is finished even if nobody listens any more, or this process dies: whatever is announced is stored
before, and another front, or whoever starts next, goes on with it. A story has one owner at a time: a front holds a
lease on it (ledger.py), and what is stored under a lease that was lost is refused (store.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

from deployments.engines.handles import Engines
from deployments.engines.metrics import StoryTimes
from deployments.stories.admission import Admission, Overloaded, Place
from deployments.stories.events import Numbering, Position, StreamEvent, after, join_text, stored_events
from deployments.stories.ledger import BEAT_S, Ledger, News
from deployments.stories.resume import Replay
from minigpt5.errors import MiniGPT5Error, StoryNotFound, StoryTaken
from minigpt5.story.safety import TextFilter
from minigpt5.story.state import PageState, StoryBuilder, StoryState, new_story_id
from minigpt5.story.store import STORY_ID, StoryStore
from minigpt5.story.stream import describe, stream_story
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

LOOK_S = 0.1
"""How often another front is asked for what is new of its story."""
LOST_S = 0.5
"""How often a story that nobody makes just now is looked at."""
TAKE_UP_S = 10.0
"""How often stories are looked for that nobody makes."""
CANCEL_S = 10.0
"""So long a story's owner has to hear that it is unwanted."""
ENDS = ("done", "error")
"""The events after which nothing comes."""


class StoryBusy(Exception):
    """A story cannot be changed now."""


class KeyTaken(Exception):
    """An Idempotency-Key that another body was sent with."""


class RunningStory:
    """One story's events so far, for any number of readers."""

    def __init__(self, builder: StoryBuilder, replay: Replay, store: StoryStore, number: int) -> None:
        """`store`: under the lease with this `number`."""
        self.builder, self.replay, self.store, self.number = builder, replay, store, number
        self.id = builder.state().id
        self.numbering = Numbering(self.id)
        self.events: list[StreamEvent] = []
        self.has_ended = False
        """As far as this process is concerned."""
        self.is_lost = False
        """Another front has taken it."""
        self.is_unwanted = False
        """Somebody has cancelled it."""
        self._news = asyncio.Event()

    def publish(self, event: StreamEvent | None) -> None:
        if event:
            self.events.append(event)
            self._announce_news()

    def end(self, final: StoryState | None) -> None:
        """Tell the readers: how it ended, or that it does elsewhere."""
        if final:
            self.events.append(self.numbering.end(final))
        self.has_ended = True
        self._announce_news()

    def _announce_news(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def page_state(self, index: int) -> PageState:
        return self.replay.drawn.get(index) or self.builder.page_state(index)

    async def follow(self) -> AsyncIterator[StreamEvent]:
        """All events from the first, then the coming ones as they come."""
        position = 0
        while True:
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.has_ended:
                return
            await self._news.wait()

    async def tell(self, ledger: Ledger) -> None:
        """Its events to the readers at other fronts, as long as there are any."""
        start = 0
        while True:
            events = self.events[start:]
            if not await ledger.tell(self.id, self.number, start, events):
                return
            start += len(events)
            if self.has_ended and start == len(self.events):
                return
            await asyncio.sleep(LOOK_S)


class Registry:
    """Starts stories and owns them until their end."""

    def __init__(
        self,
        engines: Engines,
        store: StoryStore,
        admission: Admission,
        ledger: Ledger,
        *,
        model: str,
        text_filter: TextFilter | None = None,
    ) -> None:
        self.front = secrets.token_hex(8)
        self._engines, self._store, self._admission, self._model = engines, store, admission, model
        self._ledger, self._text_filter = ledger, text_filter
        self._leases: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stories: dict[str, RunningStory] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._side: set[asyncio.Task[None]] = set()
        self._times = StoryTimes()

    async def keep_watch(self) -> None:
        """Say that this front lives, and do what the others say, without end; take up what nobody finished. Who has
        just started may be told that it is too soon: so it looks again and again."""
        epoch, look_at = "", 0.0
        while True:
            try:
                news = await self._ledger.beat(self.front, dict(self._leases), self._admission.load)
                if news.epoch != epoch or time.monotonic() >= look_at:
                    epoch, look_at = news.epoch, time.monotonic() + TAKE_UP_S
                    self._aside(self.take_up())
                await self.hear(news)
            except Exception as failure:  # it may be starting anew
                logger.warning("the ledger does not answer: %s", describe(failure))
            await asyncio.sleep(BEAT_S)

    async def hear(self, news: News) -> None:
        """Do what the others say."""
        self._admission.others = news.load
        for name, number in news.lost.items():
            if (story := self._stories.get(name)) and story.number == number:
                self._lose(story)
        for name in news.unwanted:
            if name in self._stories:
                self._aside(self.cancel(name))
        for name in news.followed:
            if (story := self._stories.get(name)) and name not in self._telling:
                self._tell(story)
        for name in news.orphans:
            if name not in self._leases:
                self._aside(self._take_up_alone(name))

    async def start(self, request: StoryRequest, *, story_id: str = "") -> RunningStory:
        """Raises Overloaded, or InvalidRequest where the generator cannot write it."""
        builder = StoryBuilder(request, story_id=story_id or new_story_id(), model=self._model)
        async with self._leased(builder.state().id, is_new=True) as number:
            return await self._start(builder, (), number)

    async def start_once(self, request: StoryRequest, key: str, digest: str) -> str:
        """The id of the story that was begun under `key`; where there is none, it is begun now. `digest`: of the body.
        Raises KeyTaken, or as `start` does."""
        name = hashlib.sha256(f"{request.key}\0{key}".encode()).hexdigest()
        async with self._in_turn(f"once-{name}"):
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
        self,
        state: StoryState,
        request: StoryRequest,
        store: StoryStore,
        *,
        change: Callable[[], None] = lambda: None,
    ) -> RunningStory:
        """Run a stored story again, or more of it: what is finished stays. Called by who is `alone` with it, and has
        its `store`. `change` is made to what is stored when nothing can refuse the story any more. Raises as `start`
        does."""
        builder = StoryBuilder(request, story_id=state.id, model=state.model, created=state.created)
        return await self._start(builder, state.pages, self._leases[state.id], change)

    async def take_up(self) -> None:
        """Go on with every story that nobody finished, and nobody makes."""
        for story_id in await asyncio.to_thread(self._store.running):
            await self._take_up_alone(story_id)

    async def _take_up_alone(self, story_id: str) -> None:
        try:
            async with self._leased(story_id) as number:
                await self._take_up(story_id, self._store.owned(number))
        except (StoryBusy, StoryTaken):  # somebody is at it already
            return
        except Exception as failure:  # one story that cannot be gone on with does not stop the others
            logger.error("%s cannot be gone on with: %s", story_id, describe(failure))

    async def _take_up(self, story_id: str, store: StoryStore) -> None:
        if not STORY_ID.fullmatch(story_id) or story_id not in await asyncio.to_thread(store.running):
            return
        await asyncio.to_thread(store.mark, story_id, is_running=True)
        try:
            state = await asyncio.to_thread(store.load, story_id)
        except StoryNotFound:  # it was never accepted, or is deleted
            return await asyncio.to_thread(store.mark, story_id, is_running=False)
        if state.status != "drawing":  # only the mark was left
            return await asyncio.to_thread(store.mark, story_id, is_running=False)
        request = await asyncio.to_thread(store.load_request, story_id)
        while True:
            try:
                await self.go_on(state, request, store)
                return
            except Overloaded as refusal:
                await asyncio.sleep(refusal.retry_after_s)

    @contextlib.asynccontextmanager
    async def alone(self, story_id: str) -> AsyncIterator[StoryStore]:
        """Change what is stored of a story, by this store. Raises StoryBusy while it is being made, or changed by
        somebody else."""
        async with self._leased(story_id) as number:
            store = self._store.owned(number)
            await asyncio.to_thread(store.mark, story_id, is_running=True)
            try:
                yield store
            finally:
                if story_id not in self._stories:
                    with contextlib.suppress(StoryTaken):
                        await _to_the_end(asyncio.to_thread(store.mark, story_id, is_running=False))

    @contextlib.asynccontextmanager
    async def _leased(self, name: str, *, is_new: bool = False) -> AsyncIterator[int]:
        """Hold a lease, until a story that was started under it has ended. Raises StoryBusy where somebody has it."""
        number = await self._claim(name, is_new=is_new)
        if number is None:
            raise StoryBusy(f"{name} is being worked on: wait for its end, or cancel it")
        try:
            yield number
        finally:
            if name not in self._stories:
                await self._release(name, number)

    @contextlib.asynccontextmanager
    async def _in_turn(self, name: str) -> AsyncIterator[None]:
        """Hold a lease, after whoever has it."""
        while (number := await self._claim(name)) is None:
            await asyncio.sleep(LOOK_S)
        try:
            yield
        finally:
            await self._release(name, number)

    async def _claim(self, name: str, *, is_new: bool = False) -> int | None:
        number = None if name in self._leases else await self._ledger.claim(self.front, name, is_new=is_new)
        if number is not None:
            self._leases[name] = number
        return number

    async def _release(self, name: str, number: int) -> None:
        if self._leases.get(name) == number:
            del self._leases[name]
            try:
                await _to_the_end(self._ledger.release(name, number))
            except Exception as failure:  # then it expires
                logger.warning("the lease on %s is not given back: %s", name, describe(failure))

    def _aside(self, work: Coroutine[object, object, object]) -> None:
        """Do it without anybody waiting for it, and though the request at hand is cancelled."""

        async def run() -> None:
            try:
                await work
            except Exception as failure:
                logger.warning("beside a request: %s", describe(failure))

        task = asyncio.create_task(run(), context=contextvars.Context())
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    def find(self, story_id: str) -> RunningStory | None:
        """A story that runs here."""
        return self._stories.get(story_id)

    async def follow(self, story_id: str, seen: Position | None) -> AsyncIterator[StreamEvent]:
        """What comes after `seen`, or all, wherever the story runs or ended. Raises StoryNotFound."""
        while True:
            events = self._told(story_id)
            name = ""
            async with contextlib.aclosing(events):
                async for event in after(events, seen) if seen else events:
                    seen, name = event.position, event.name
                    yield event
            if name in ENDS:
                return
            await asyncio.sleep(LOST_S)

    async def _told(self, story_id: str) -> AsyncGenerator[StreamEvent]:
        """A story's events from the first, to its end or until its owner is another one."""
        if story := self.find(story_id):
            async for event in story.follow():
                yield event
            return
        state = await asyncio.to_thread(self._store.load, story_id)
        part = await self._ledger.read(story_id, 0) if state.status == "drawing" else None
        if part is None:  # it has ended, or nobody makes it just now
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
            await asyncio.sleep(LOOK_S)
            part = await self._ledger.read(story_id, start)

    async def wait(self, story_id: str, seconds: float | None = None) -> None:
        """Until the story has ended, at most so long. Raises StoryNotFound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for _ in self.follow(story_id, None):
                    pass

    async def cancel(self, story_id: str) -> None:
        """Stop a story at the next token and the next denoising step; returns when that is stored."""
        if task := self._tasks.get(story_id):
            story = self._stories[story_id]
            if not (story.is_unwanted or story.is_lost):  # a second one would interrupt the storing of the first
                story.is_unwanted = True
                task.cancel()
            await asyncio.wait({task})
        elif await self._ledger.cancel(story_id):
            with contextlib.suppress(StoryNotFound):
                await self.wait(story_id, CANCEL_S)

    def _lose(self, story: RunningStory) -> None:
        logger.warning("%s is another front's now", story.id)
        story.is_lost = True
        self._tasks[story.id].cancel()

    def _tell(self, story: RunningStory) -> None:
        task = asyncio.create_task(story.tell(self._ledger), context=contextvars.Context())
        self._telling[story.id] = task
        task.add_done_callback(lambda task: self._telling.pop(story.id, None))

    async def _start(
        self,
        builder: StoryBuilder,
        pages: tuple[PageState, ...],
        number: int,
        change: Callable[[], None] = lambda: None,
    ) -> RunningStory:
        """Under the lease with this `number`, which the story keeps to its end."""
        request, story_id, store = builder.request, builder.state().id, self._store.owned(number)
        place = self._admission.enter(request)
        try:
            await self._engines.check(request)
            story = RunningStory(builder, Replay(self._engines, store, story_id, pages), store, number)
            await asyncio.to_thread(_begin, store, builder, change)
        except BaseException:
            place.leave()
            raise
        # In a context of its own: Serve cancels what a request's context has started when its client is gone.
        task = asyncio.create_task(self._run(story, place), context=contextvars.Context())
        self._tasks[story_id], self._stories[story_id] = task, story
        return story

    async def _run(self, story: RunningStory, place: Place) -> None:
        builder, final = story.builder, None
        try:
            await self._make(story, place)
            final = await self._end(story, builder.state("done"))
        except asyncio.CancelledError:
            if not story.is_unwanted:  # this process ends, or has lost the story: another one goes on with it
                raise
            final = await self._end(story, builder.state("cancelled"))
        except StoryTaken as loss:
            logger.warning("%s", loss)
            story.is_lost = True
        except Exception as failure:  # whatever it was, its readers must hear of it
            logger.error("%s failed: %s", story.id, type(getattr(failure, "cause", None) or failure).__name__)
            final = await self._end(story, builder.state("failed", error=describe(failure)))
        finally:
            place.leave()
            del self._tasks[story.id], self._stories[story.id]
            if final or story.is_lost:
                await self._release(story.id, story.number)
            else:
                self._leases.pop(story.id, None)
            story.end(final)

    async def _make(self, story: RunningStory, place: Place) -> None:
        replay, clock = story.replay, self._times.start()
        # Calls of one story go to the replica that has its earlier pages.
        request = dataclasses.replace(story.builder.request, session=story.id)
        events = stream_story(request, replay.generate, replay.decode, story_id=story.id)
        async with contextlib.aclosing(join_text(events)) as joined:  # type: ignore[type-var]
            async for event in joined:
                story.builder.add(event)
                if self._text_filter and isinstance(event, SlotOpened):
                    self._text_filter.check(story.builder.text(event.page), f"page {event.page}")
                place.see(event)
                clock.see(event)
                await _to_the_end(asyncio.to_thread(self._keep, story, event))
                story.publish(_announce(story, event))

    async def _end(self, story: RunningStory, state: StoryState) -> StoryState | None:
        """Store how a story ended, and its pages as far as they are; None where it is another front's now."""

        store = story.store

        def keep() -> StoryState:
            for page in state.pages:
                if state.status != "done" and not page.image and page.index not in story.replay.drawn:
                    store.save_page(state.id, page)
            store.save(state)
            ended = store.load(state.id)
            store.mark(state.id, is_running=False)
            return ended

        try:
            return await asyncio.to_thread(keep)
        except StoryTaken:
            story.is_lost = True
            return None
        except (OSError, MiniGPT5Error) as failure:  # the storage may be what failed
            logger.error("%s: how it ended is not stored: %s", story.id, failure)
            return state

    def _keep(self, story: RunningStory, event: StoryEvent) -> None:
        """Store what an event announces, but for what was stored before."""
        match event:
            case Picture(page=index) if index not in story.replay.drawn:
                story.store.save_picture(story.id, event)
            case SlotOpened(page=index) if index not in story.replay.drawn:
                story.store.save_page(story.id, story.page_state(index))
            case PageDone() if event.page.index not in story.replay.drawn:
                story.store.save_page(story.id, story.page_state(event.page.index))


def _begin(store: StoryStore, builder: StoryBuilder, change: Callable[[], None]) -> None:
    """Store what was asked for, before anybody is told that it was accepted."""
    state = builder.state()
    store.mark(state.id, is_running=True)
    store.save_request(state.id, builder.request)
    store.save(state)
    change()


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


async def _to_the_end(work: Coroutine[object, object, object]) -> None:
    """What has begun to be stored is stored, though the task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
