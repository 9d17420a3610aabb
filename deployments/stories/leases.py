"""The leases of one front: a story has one owner at a time, and what is stored under a lost lease is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from deployments.stories.ledger import Ledger
from deployments.stories.store_threads import writing
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.errors import StoryDamaged, StoryNotFound, StoryTaken
from minigpt5.story.store import StoryStore
from minigpt5.story.stream import describe

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
"""How often a lease that another holder has is asked for again."""


class StoryBusy(Exception):
    """A story cannot be changed now."""


@dataclass(eq=False, kw_only=True)
class Lease:
    """A right to work on a name, such as a story's id, that no other front has at the same time.

    Example: Lease(name="story_3f", number=1767225600000000000, store=store.owned(1767225600000000000))
    """

    name: str
    number: int
    """The fencing number: each lease on a name has a greater one than the lease before."""
    store: StoryStore
    """The stories, as the lease's holder may change them: writes raise StoryTaken once another front has the story."""
    is_kept: bool = False
    """Its holder keeps it beyond the context that took it, and then calls `release` or `abandon`."""


class Leases:
    """Leases that this front holds. The ledger grants and numbers them, and ends those of a front that is silent."""

    def __init__(self, ledger: Ledger, store: StoryStore) -> None:
        self.front = secrets.token_hex(8)
        """The front's name in the ledger."""
        self._ledger, self._store = ledger, store
        self._held: dict[str, int] = {}

    @property
    def held(self) -> dict[str, int]:
        """Name -> fencing number."""
        return dict(self._held)

    @contextlib.asynccontextmanager
    async def hold(self, name: str, *, is_new: bool = False) -> AsyncIterator[Lease]:
        """Hold a lease within the context, or longer where its `is_kept` is set.

        `is_new`: nobody can have it yet. Raises StoryBusy where another request or front has it.
        """
        lease = await self._claim(name, is_new=is_new)
        if lease is None:
            raise StoryBusy(f"{name} is being worked on: wait for its end, or cancel it")
        try:
            yield lease
        finally:
            if not lease.is_kept:
                await self.release(lease)

    @contextlib.asynccontextmanager
    async def exclusive(self, story_id: str) -> AsyncIterator[Lease]:
        """Hold a story to change it. The store has it marked as running, so that a change that was cut off is found.
        One that is still to be made afterwards keeps the mark, and is recovered.

        Raises StoryBusy while the story runs, or while another request changes it."""
        async with self.hold(story_id) as lease:
            await writing(lease.store.mark, story_id, is_running=True)
            try:
                yield lease
            finally:
                if not lease.is_kept:
                    with contextlib.suppress(StoryTaken):
                        await uninterrupted(writing(_unmark, lease.store, story_id))

    @contextlib.asynccontextmanager
    async def wait_for(self, name: str) -> AsyncIterator[Lease]:
        """Hold a lease within the context, after its present holder."""
        while (lease := await self._claim(name)) is None:
            await asyncio.sleep(POLL_S)
        try:
            yield lease
        finally:
            await self.release(lease)

    async def release(self, lease: Lease) -> None:
        """Give a lease back. Does nothing where this front holds it no longer."""
        if self._held.get(lease.name) == lease.number:
            del self._held[lease.name]
            try:
                await uninterrupted(self._ledger.release(lease.name, lease.number))
            except Exception as failure:  # then it expires
                logger.warning("the lease on %s is not given back: %s", lease.name, describe(failure))

    def abandon(self, lease: Lease) -> None:
        """Hold a lease no longer, and let it expire in the ledger: another front recovers the story then."""
        if self._held.get(lease.name) == lease.number:
            del self._held[lease.name]

    async def _claim(self, name: str, *, is_new: bool = False) -> Lease | None:
        number = None if name in self._held else await self._ledger.claim(self.front, name, is_new=is_new)
        if number is None:
            return None
        self._held[name] = number
        return Lease(name=name, number=number, store=self._store.owned(number))


def _unmark(store: StoryStore, story_id: str) -> None:
    """Take the mark off, unless the story is still to be made: a front that recovers it knows marks alone."""
    try:
        if store.load_status(story_id) == "drawing":
            return
    except StoryDamaged:  # somebody may mend it
        return
    except StoryNotFound:
        pass
    store.mark(story_id, is_running=False)
