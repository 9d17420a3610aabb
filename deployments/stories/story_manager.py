"""Runs stories: each is a task of the server, and clients read its events.

Accepted stories survive crashes and lost connections. Text, vokens and pictures are stored before they are announced,
and another front, or the next server on the same storage, resumes the story from there. A story has one owner at a
time: a front holds a lease on it (leases.py), and the store refuses what is written under a lost lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine

from deployments.engines.handles import Engines
from deployments.observability.metrics import ADMITTED_REQUESTS, PAGES, STORIES
from deployments.observability.recording import begin_at_zero, record
from deployments.observability.story_context import enter_story, story_context
from deployments.observability.tracing import TRACER, name_span
from deployments.stories.admission import Admission, Overloaded, Reservation
from deployments.stories.events import StreamEvent
from deployments.stories.leases import Leases, StoryBusy
from deployments.stories.ledger import HEARTBEAT_S, Instructions, Ledger
from deployments.stories.relay import EventRelay
from deployments.stories.resume import ResumedEngines
from deployments.stories.running_story import RunningStory
from deployments.stories.store_threads import writing
from deployments.stories.story_clock import StoryClock
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.config import ModelConfig
from minigpt5.errors import Blocked, MiniGPT5Error, StorageError, StoryNotFound, StoryTaken
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
    TextReset,
)

logger = logging.getLogger("ray.serve")

RECOVER_S = 10.0
"""How often the storage is searched for stories that no front runs."""
CANCEL_S = 10.0
"""How long a cancel waits for another front to end its story."""
STORED = (Picture, SlotOpened, PageDone)
"""The events that announce something to store."""


class KeyTaken(Exception):
    """An Idempotency-Key that another body was sent with."""


class StoryManager:
    """Starts stories and owns them until their end."""

    def __init__(
        self,
        engines: Engines,
        store: StoryStore,
        admission: Admission,
        ledger: Ledger,
        *,
        config: ModelConfig,
        text_filter: TextFilter | None = None,
    ) -> None:
        self._engines, self._store, self._admission, self._config = engines, store, admission, config
        self._ledger, self._text_filter = ledger, text_filter
        self._leases = Leases(ledger)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stories: dict[str, RunningStory] = {}
        self._side: set[asyncio.Task[None]] = set()
        self.relay = EventRelay(ledger, store, self._stories.get)

    @property
    def front(self) -> str:
        """This front's name in the ledger."""
        return self._leases.front

    async def keep_alive(self) -> None:
        """Send heartbeats, apply the ledger's instructions and recover orphaned stories, until cancelled.

        A front that has just started may be refused an orphan, because its owner may still be alive. Recovery is
        therefore repeated."""
        epoch, recover_at = "", 0.0
        begin_at_zero([STORIES, PAGES])
        while True:
            record(ADMITTED_REQUESTS, self._admission.num_running)
            try:
                instructions = await self._ledger.heartbeat(self.front, self._leases.held, self._admission.load)
                if instructions.epoch != epoch or time.monotonic() >= recover_at:
                    epoch, recover_at = instructions.epoch, time.monotonic() + RECOVER_S
                    self._spawn(self.recover())
                self._apply(instructions)
            except Exception as failure:  # it may be restarting
                logger.warning("the ledger does not answer: %s", describe(failure))
            await asyncio.sleep(HEARTBEAT_S)

    def _apply(self, instructions: Instructions) -> None:
        self._admission.others = instructions.load
        for name, number in instructions.lost.items():
            if (story := self._stories.get(name)) and story.number == number:
                self._lose(story)
        for name in instructions.cancelled:
            if name in self._stories:
                self._spawn(self.cancel(name))
        for name in instructions.followed:
            if story := self._stories.get(name):
                self.relay.publish(story)
        for name in instructions.orphans:
            if name not in self._leases.held:
                self._spawn(self._recover_exclusively(name), story_context(name))

    async def start(self, request: StoryRequest, *, story_id: str = "") -> RunningStory:
        """Begin a new story. Raises Overloaded, or InvalidRequest where the generator cannot write it."""
        builder = StoryBuilder(request, story_id=story_id or new_story_id(), model=self._config.name)
        async with self._lease(builder.state().id, is_new=True) as number:
            return await self._start(builder, (), number)

    async def start_once(self, request: StoryRequest, key: str, digest: str) -> str:
        """Return the id of the story that was begun under an Idempotency-Key; begin it where there is none.

        `digest`: of the request's body. Raises KeyTaken, or as `start` does."""
        name = hashlib.sha256(f"{request.key}\0{key}".encode()).hexdigest()
        async with self._leases.wait_for(f"once-{name}"):
            if known := await writing(self._store.load_once, name):
                story_id, digest_of_first = known
                if digest_of_first != digest:
                    raise KeyTaken(f"this key has begun {story_id} with another body: send another key")
                with contextlib.suppress(StoryNotFound):  # it was not begun after all, or is deleted
                    await writing(self._store.load, story_id)
                    return story_id
            story_id = known[0] if known else new_story_id()
            await writing(self._store.save_once, name, story_id, digest)
            await self.start(request, story_id=story_id)
            return story_id

    async def resume(
        self,
        state: StoryState,
        request: StoryRequest,
        store: StoryStore,
        *,
        change: Callable[[], None] = lambda: None,
    ) -> RunningStory:
        """Run a stored story to its end, or extend it: finished pages stay.

        The caller holds the story by `exclusive`, which gave it `store`. `change` is applied to the stored story once
        nothing can refuse it any more. Raises as `start` does."""
        builder = StoryBuilder(request, story_id=state.id, model=state.model, created=state.created)
        return await self._start(builder, state.pages, self._leases.held[state.id], change)

    async def recover(self) -> None:
        """Resume every unfinished story that no front runs."""
        for story_id in await writing(self._store.running):
            await asyncio.create_task(self._recover_exclusively(story_id), context=story_context(story_id))

    async def _recover_exclusively(self, story_id: str) -> None:
        try:
            async with self._lease(story_id) as number:
                await self._recover(story_id, self._store.owned(number))
        except (StoryBusy, StoryTaken):  # another front runs it
            return
        except Exception as failure:  # a story that cannot be resumed does not stop the others
            logger.error("%s cannot be resumed: %s", story_id, describe(failure))

    async def _recover(self, story_id: str, store: StoryStore) -> None:
        if not STORY_ID.fullmatch(story_id) or story_id not in await writing(store.running):
            return
        await writing(store.mark, story_id, is_running=True)
        try:
            state = await writing(store.load, story_id)
        except StoryNotFound:  # it was never accepted, or is deleted
            return await writing(store.mark, story_id, is_running=False)
        if state.status != "drawing":  # only the mark was left
            return await writing(store.mark, story_id, is_running=False)
        request = await writing(store.load_request, story_id)
        request = dataclasses.replace(request, draw=self._config.drawable(request.draw))
        while True:
            try:
                await self.resume(state, request, store)
                return
            except Overloaded as refusal:
                await asyncio.sleep(refusal.retry_after_s)

    @contextlib.asynccontextmanager
    async def exclusive(self, story_id: str) -> AsyncIterator[StoryStore]:
        """Give a store that may change a story. Raises StoryBusy while the story runs, or while another request changes
        it."""
        async with self._lease(story_id) as number:
            store = self._store.owned(number)
            await writing(store.mark, story_id, is_running=True)
            try:
                yield store
            finally:
                if story_id not in self._stories:
                    with contextlib.suppress(StoryTaken):
                        await uninterrupted(writing(store.mark, story_id, is_running=False))

    def _lease(self, story_id: str, *, is_new: bool = False) -> contextlib.AbstractAsyncContextManager[int]:
        """A lease within the context; a story that was started there keeps it to its end."""
        return self._leases.hold(story_id, is_new=is_new, is_kept=lambda: story_id in self._stories)

    def _spawn(self, work: Coroutine[object, object, object], context: contextvars.Context | None = None) -> None:
        """Run `work` in the background, even where the calling request is cancelled. `context`: by default none of the
        calling request's."""

        async def run() -> None:
            try:
                await work
            except Exception as failure:
                logger.warning("in the background: %s", describe(failure))

        task = asyncio.create_task(run(), context=context or contextvars.Context())
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    def find(self, story_id: str) -> RunningStory | None:
        """A story that runs here."""
        return self._stories.get(story_id)

    async def cancel(self, story_id: str) -> None:
        """Stop a story at the next token and the next denoising step; returns when that is stored."""
        if task := self._tasks.get(story_id):
            story = self._stories[story_id]
            if not (story.is_cancelled or story.is_lost):  # a second one would interrupt the storing of the first
                story.is_cancelled = True
                task.cancel()
            await asyncio.wait({task})
        elif await self._ledger.cancel(story_id):
            with contextlib.suppress(StoryNotFound):
                await self.relay.wait(story_id, CANCEL_S)

    def _lose(self, story: RunningStory) -> None:
        story.is_lost = True
        self._tasks[story.id].cancel()

    async def _start(
        self,
        builder: StoryBuilder,
        pages: tuple[PageState, ...],
        number: int,
        change: Callable[[], None] = lambda: None,
    ) -> RunningStory:
        """Under the lease with this `number`, which the story keeps to its end."""
        request, story_id, store = builder.request, builder.state().id, self._store.owned(number)
        enter_story(story_id)
        reservation = self._admission.reserve(request)
        try:
            await self._engines.validate_request(request)
            story = RunningStory(builder, ResumedEngines(self._engines, store, story_id, pages), store, number)
            await writing(_begin, store, builder, change)
        except BaseException:
            reservation.release()
            raise
        task = asyncio.create_task(self._run(story, reservation), context=story_context(story_id))
        self._tasks[story_id], self._stories[story_id] = task, story
        return story

    async def _run(self, story: RunningStory, reservation: Reservation) -> None:
        builder, clock, final, outcome = story.builder, StoryClock(known=story.engines.drawn), None, "done"
        logger.info("story begins", extra={"pages": builder.request.pages})
        try:
            with TRACER.start_as_current_span("story"):
                name_span(pages=builder.request.pages)
                await self._make(story, reservation, clock)
            final = await self._end(story, builder.state("done"))
        except asyncio.CancelledError:
            if not story.is_cancelled:  # this process ends, or has lost the story: another one resumes it
                outcome = "handed_over"
                raise
            outcome = "cancelled"
            final = await self._end(story, builder.state("cancelled"))
        except StoryTaken as loss:
            logger.warning("%s", loss)
            story.is_lost = True
        except Exception as failure:  # whatever it was, its readers must hear of it
            outcome = _outcome(failure)
            cause = failure.__cause__ if isinstance(failure, StorageError) else None
            logger.error("%s failed: %s", story.id, cause or type(getattr(failure, "cause", None) or failure).__name__)
            final = await self._end(story, builder.state("failed", error=describe(failure)))
        finally:
            if not story.is_stored:
                outcome = "storage_error"
            elif story.is_lost:
                outcome = "handed_over"
            record(STORIES, 1, outcome=outcome)
            logger.info("story ends", extra={"outcome": outcome, "seconds": round(clock.seconds, 3)})
            reservation.release()
            del self._tasks[story.id], self._stories[story.id]
            if final or story.is_lost:
                await self._leases.release(story.id, story.number)
            else:
                self._leases.abandon(story.id)
            story.end(final)

    async def _make(self, story: RunningStory, reservation: Reservation, clock: StoryClock) -> None:
        engines = story.engines
        # Calls of one story go to the replica that has its earlier pages.
        request = dataclasses.replace(story.builder.request, session=story.id)
        stream = stream_story(request, engines.generate, engines.decode, story_id=story.id)
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                story.builder.add(event)
                if self._text_filter and isinstance(event, SlotOpened):
                    self._text_filter.check_text(story.builder.text(event.page), f"page {event.page}")
                reservation.observe(event)
                if isinstance(event, STORED):  # a thread for each piece of text would cost more than the text
                    with clock.storing(event):
                        await uninterrupted(writing(self._keep, story, event))
                clock.observe(event)
                story.add(_announce(story, event))

    async def _end(self, story: RunningStory, state: StoryState) -> StoryState | None:
        """Store how a story ended, and its pages as far as they are; None where it is another front's now."""
        store = story.store

        def keep() -> StoryState:
            for page in state.pages:
                if state.status != "done" and not page.image and page.index not in story.engines.drawn:
                    store.save_page(state.id, page)
            store.save(state)
            ended = store.load(state.id)
            store.mark(state.id, is_running=False)
            return ended

        try:
            return await writing(keep)
        except StoryTaken:
            story.is_lost = True
            return None
        except (OSError, MiniGPT5Error) as failure:  # the storage may be what failed
            logger.error("%s: how it ended is not stored: %s", story.id, failure)
            story.is_stored = False
            return state

    def _keep(self, story: RunningStory, event: StoryEvent) -> None:
        """Store what an event announces, but for what was stored before."""
        match event:
            case Picture(page=index) if index not in story.engines.drawn:
                story.store.save_picture(story.id, event)
            case SlotOpened(page=index) if index not in story.engines.drawn:
                story.store.save_page(story.id, story.page_state(index))
            case PageDone() if event.page.index not in story.engines.drawn:
                story.store.save_page(story.id, story.page_state(event.page.index))


def _outcome(failure: Exception) -> str:
    """How a story ended that failed, as the metric has it."""
    if isinstance(failure, OSError | StorageError):
        return "storage_error"
    return "blocked" if isinstance(failure, Blocked) else "engine_error"


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
        case TextReset(page=page):
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
