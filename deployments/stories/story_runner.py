"""Runs stories: each is a task of the server, under a lease, from its acceptance to its end.

Accepted stories survive crashes and lost connections. Text, vokens and pictures are stored before they are announced,
and another front, or the next server on the same storage, resumes the story from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable

from deployments.engines.handles import Engines
from deployments.observability.metrics import STORIES
from deployments.observability.recording import record
from deployments.observability.story_context import enter_story, story_context
from deployments.observability.tracing import TRACER, name_span
from deployments.stories.admission import Admission, Overloaded, Reservation
from deployments.stories.leases import Lease, Leases, StoryBusy
from deployments.stories.resume import ResumedEngines
from deployments.stories.running_story import STORED, RunningStory
from deployments.stories.store_threads import writing
from deployments.stories.story_clock import StoryClock
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.config import ModelConfig
from minigpt5.errors import (
    Blocked,
    InvalidRequest,
    MiniGPT5Error,
    StorageError,
    StoryDamaged,
    StoryNotFound,
    StoryTaken,
)
from minigpt5.story.safety import TextFilter
from minigpt5.story.state import PageState, StoryBuilder, StoryState, new_story_id
from minigpt5.story.store import STORY_ID, StoryStore
from minigpt5.story.stream import describe, stream_story
from minigpt5.types import Page, SlotOpened, StoryRequest, TextReset

logger = logging.getLogger("ray.serve")


class StoryRunner:
    """Starts stories, and owns each until its end. A story ends here once: done, failed, cancelled, or handed over.

    A story that is handed over ends without being stored as ended: this process ends, another front has taken the
    story, or the storage fails. Its lease is then left to expire. The front that recovers it resumes it, and its
    readers wait for that.
    """

    def __init__(
        self,
        engines: Engines,
        admission: Admission,
        leases: Leases,
        *,
        config: ModelConfig,
        text_filter: TextFilter | None = None,
    ) -> None:
        self._engines, self._admission, self._leases = engines, admission, leases
        self._config, self._text_filter = config, text_filter
        self._running: dict[str, tuple[RunningStory, asyncio.Task[None]]] = {}

    def find(self, story_id: str) -> RunningStory | None:
        """A story that runs here."""
        story, _ = self._running.get(story_id, (None, None))
        return story

    async def start(self, request: StoryRequest, *, story_id: str = "") -> RunningStory:
        """Begin a new story. Raises Overloaded, or InvalidRequest where the generator cannot write it."""
        builder = StoryBuilder(request, story_id=story_id or new_story_id(), model=self._config.name)
        async with self._leases.hold(builder.state().id, is_new=True) as lease:
            return await self._start(builder, None, lease)

    async def resume(
        self, state: StoryState, request: StoryRequest, lease: Lease, *, change: Callable[[], None] = lambda: None
    ) -> RunningStory:
        """Run a stored story to its end, or extend it: finished pages stay.

        The caller holds the story by `lease`, and the story keeps it. `change` is applied to the stored story once
        nothing can refuse it any more. Raises as `start` does."""
        builder = StoryBuilder(request, story_id=state.id, model=state.model, created=state.created)
        return await self._start(builder, state.pages, lease, change)

    async def recover(self, story_id: str) -> None:
        """Resume an unfinished story, unless another front runs it. What stands against it is logged."""
        try:
            async with self._leases.hold(story_id) as lease:
                await self._recover(story_id, lease)
        except (StoryBusy, StoryTaken):  # another front runs it
            return
        except Exception as failure:  # a story that cannot be resumed does not stop the others
            logger.error("%s cannot be resumed: %s", story_id, describe(failure))

    async def cancel(self, story_id: str) -> bool:
        """Stop a story at the next token and the next denoising step. Returns when that is stored, or False where the
        story does not run here."""
        if story_id not in self._running:
            return False
        story, task = self._running[story_id]
        if not (story.is_cancelled or story.is_lost):  # a second one would interrupt the storing of the first
            story.is_cancelled = True
            task.cancel()
        await asyncio.wait({task})
        return True

    def lose(self, story_id: str, number: int) -> None:
        """Stop a story whose lease with this number another front has taken: it is made there from now on."""
        story, task = self._running.get(story_id, (None, None))
        if story and task and story.number == number:
            story.is_lost = True
            task.cancel()

    async def _recover(self, story_id: str, lease: Lease) -> None:
        store = lease.store
        if not STORY_ID.fullmatch(story_id) or story_id not in await writing(store.running):
            return
        await writing(store.mark, story_id, is_running=True)
        try:
            state = await writing(store.load, story_id)
        except StoryDamaged:  # somebody may mend it
            raise
        except StoryNotFound:  # it was never accepted, or is deleted
            return await writing(store.mark, story_id, is_running=False)
        if state.status != "drawing":  # only the mark was left
            return await writing(store.mark, story_id, is_running=False)
        request = await writing(store.load_request, story_id)
        request = self._config.resumable(request)
        while True:
            try:
                await self.resume(state, request, lease)
                return
            except Overloaded as refusal:
                await asyncio.sleep(refusal.retry_after_s)
            except InvalidRequest as refusal:  # by another model than the one that accepted it
                return await writing(_fail, store, state, str(refusal))

    async def _start(
        self,
        builder: StoryBuilder,
        stored: tuple[PageState, ...] | None,
        lease: Lease,
        change: Callable[[], None] = lambda: None,
    ) -> RunningStory:
        """`stored`: pages of a story that was accepted before; None of a new one."""
        pages = stored or ()
        enter_story(lease.name)
        reservation = self._admission.reserve(_left_of(self._config.fitted(builder.request), pages))
        try:
            await self._engines.validate_request(builder.request)
            story = RunningStory(builder, ResumedEngines(self._engines, lease.store, lease.name, pages), lease)
            await uninterrupted(writing(story.keep_request, change))  # who leaves meanwhile leaves a story to recover
        except BaseException:
            reservation.release()
            raise
        lease.is_kept = True
        clock = StoryClock(known=story.engines.drawn, is_new=stored is None)
        task = asyncio.create_task(self._run(story, reservation, clock), context=story_context(story.id))
        self._running[story.id] = story, task
        return story

    async def _run(self, story: RunningStory, reservation: Reservation, clock: StoryClock) -> None:
        builder, final, outcome = story.builder, None, "done"
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
        except StorageError as failure:  # what is stored stays: a front resumes the story when the storage answers
            logger.error("%s waits for the storage: %s", story.id, failure.__cause__ or failure)
            story.is_stored = False
        except Exception as failure:  # whatever it was, its readers must hear of it
            outcome = "blocked" if isinstance(failure, Blocked) else "engine_error"
            logger.error("%s failed: %s", story.id, type(getattr(failure, "cause", None) or failure).__name__)
            final = await self._end(story, builder.state("failed", error=describe(failure)))
        finally:
            if not story.is_stored:
                outcome = "storage_error"
            elif story.is_lost:
                outcome = "handed_over"
            record(STORIES, 1, outcome=outcome)
            logger.info("story ends", extra={"outcome": outcome, "seconds": round(clock.seconds, 3)})
            reservation.release()
            del self._running[story.id]
            if final or story.is_lost:
                await self._leases.release(story.lease)
            else:
                self._leases.abandon(story.lease)
            story.end(final)

    async def _make(self, story: RunningStory, reservation: Reservation, clock: StoryClock) -> None:
        engines = story.engines
        # Calls of one story go to the replica that has its earlier pages.
        request = dataclasses.replace(self._config.fitted(story.builder.request), session=story.id)
        stream = stream_story(request, engines.generate, engines.decode, story_id=story.id)
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                story.builder.add(event)
                if self._text_filter and isinstance(event, SlotOpened):
                    self._check_page(story, event.page, self._text_filter)
                reservation.observe(event)
                if isinstance(event, STORED):  # a thread for each piece of text would cost more than the text
                    with clock.storing(event):
                        await uninterrupted(writing(story.keep, event))
                clock.observe(event)
                story.announce(event)

    def _check_page(self, story: RunningStory, page: int, text_filter: TextFilter) -> None:
        """Raises Blocked, after the text is taken back: its readers drop it, and it is not stored."""
        try:
            text_filter.check_text(story.builder.text(page), f"page {page}")
        except Blocked:
            story.builder.add(TextReset(page=page))
            story.announce(TextReset(page=page))
            raise

    async def _end(self, story: RunningStory, state: StoryState) -> StoryState | None:
        """Store how a story ended; None where it is another front's now, or the storage fails."""
        try:
            return await writing(story.keep_end, state)
        except StoryTaken:
            story.is_lost = True
            return None
        except (OSError, MiniGPT5Error) as failure:
            logger.error("%s: how it ended is not stored: %s", story.id, failure.__cause__ or failure)
            story.is_stored = False
            return None


def _left_of(request: StoryRequest, pages: tuple[PageState, ...]) -> StoryRequest:
    """What is left of a story whose pages are stored, as admission counts it: pages with a picture cost nothing."""
    known = tuple(Page(index=page.index, text=page.text) for page in pages if page.image)
    return dataclasses.replace(request, pages=max(1, request.pages - len(known)), previous=known)


def _fail(store: StoryStore, state: StoryState, error: str) -> None:
    """Store that a story has failed before it ran."""
    store.save(dataclasses.replace(state, status="failed", error=error))
    store.mark(state.id, is_running=False)
