"""What one front says to the others, and does because of them, by the ledger that all fronts share."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import Coroutine

from deployments.observability.metrics import ADMITTED_REQUESTS, PAGES, STORIES
from deployments.observability.recording import begin_at_zero, record
from deployments.observability.story_context import story_context
from deployments.stories.admission import Admission
from deployments.stories.leases import Leases, StoryBusy
from deployments.stories.ledger import HEARTBEAT_S, Instructions, Ledger
from deployments.stories.relay import EventRelay
from deployments.stories.store_threads import writing
from deployments.stories.story_runner import StoryRunner
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.errors import StoryNotFound
from minigpt5.story.store import StoryStore
from minigpt5.story.stream import describe

logger = logging.getLogger("ray.serve")

RECOVER_S = 10.0
"""How often the storage is searched for stories that no front runs."""
CANCEL_S = 10.0
"""How long a cancel waits for another front to end its story."""


class Coordinator:
    """Keeps this front in step with the others.

    Its heartbeats keep the front's leases. The replies say which stories the front has lost, must cancel or must send
    to readers elsewhere, and which stories no front runs: those it recovers. A ledger that does not answer is asked
    again at the next heartbeat.
    """

    def __init__(
        self,
        ledger: Ledger,
        store: StoryStore,
        admission: Admission,
        leases: Leases,
        runner: StoryRunner,
        relay: EventRelay,
    ) -> None:
        self._ledger, self._store, self._admission = ledger, store, admission
        self._leases, self._runner, self._relay = leases, runner, relay
        self._background: set[asyncio.Task[None]] = set()

    async def keep_alive(self) -> None:
        """Send heartbeats, apply the ledger's instructions and recover orphaned stories, until cancelled.

        A front that has just started may be refused an orphan, because its owner may still be alive. Recovery is
        therefore repeated."""
        epoch, recover_at = "", 0.0
        begin_at_zero([STORIES, PAGES])
        while True:
            record(ADMITTED_REQUESTS, self._admission.num_running)
            try:
                instructions = await self._ledger.heartbeat(self._leases.front, self._leases.held, self._admission.load)
                if instructions.epoch != epoch or time.monotonic() >= recover_at:
                    epoch, recover_at = instructions.epoch, time.monotonic() + RECOVER_S
                    self._spawn(self.recover())
                self._apply(instructions)
            except Exception as failure:  # it may be restarting
                logger.warning("the ledger does not answer: %s", describe(failure))
            await asyncio.sleep(HEARTBEAT_S)

    async def recover(self) -> None:
        """Resume every unfinished story that no front runs."""
        for story_id in await writing(self._store.running):
            await asyncio.create_task(self._runner.recover(story_id), context=story_context(story_id))

    async def cancel(self, story_id: str) -> None:
        """Stop a story wherever it runs, or before a front recovers it; returns when that is stored, or after
        CANCEL_S."""
        if await self._runner.cancel(story_id):
            return
        if await self._ledger.cancel(story_id):
            with contextlib.suppress(StoryNotFound):
                await self._relay.wait(story_id, CANCEL_S)
        with contextlib.suppress(StoryBusy, StoryNotFound):
            if await writing(self._store.load_status, story_id) == "drawing":
                await self._end_orphan(story_id)

    async def _end_orphan(self, story_id: str) -> None:
        """Store that a story which no front runs is cancelled. Raises StoryBusy where one runs it after all."""
        async with self._leases.exclusive(story_id) as lease:
            state = await writing(self._store.load, story_id)
            if state.status == "drawing":
                await uninterrupted(writing(lease.store.save, dataclasses.replace(state, status="cancelled")))

    def _apply(self, instructions: Instructions) -> None:
        self._admission.others = instructions.load
        for name, number in instructions.lost.items():
            self._runner.lose(name, number)
        for name in instructions.cancelled:
            self._spawn(self._runner.cancel(name))
        for name in instructions.followed:
            if story := self._runner.find(name):
                self._relay.publish(story)
        for name in instructions.orphans:
            if name not in self._leases.held:
                self._spawn(self._runner.recover(name), story_context(name))

    def _spawn(self, work: Coroutine[object, object, object], context: contextvars.Context | None = None) -> None:
        """Run `work` in the background. `context`: by default none of the caller's."""

        async def run() -> None:
            try:
                await work
            except Exception as failure:
                logger.warning("in the background: %s", describe(failure))

        task = asyncio.create_task(run(), context=context or contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
