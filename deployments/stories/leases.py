"""The leases of one front: a story has one owner at a time, and what is stored under a lost lease is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable

from deployments.stories.ledger import Ledger
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.story.stream import describe

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
"""How often a lease that another holder has is asked for again."""


class StoryBusy(Exception):
    """A story cannot be changed now."""


class Leases:
    """Leases that this front holds, by name. The ledger grants them and numbers them."""

    def __init__(self, ledger: Ledger) -> None:
        self.front = secrets.token_hex(8)
        """The front's name in the ledger."""
        self._ledger = ledger
        self._held: dict[str, int] = {}

    @property
    def held(self) -> dict[str, int]:
        """Name -> fencing number."""
        return dict(self._held)

    @contextlib.asynccontextmanager
    async def hold(
        self, name: str, *, is_new: bool = False, is_kept: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[int]:
        """Hold a lease within the context, or longer where `is_kept` says so at its end: then `release` gives it back.

        `is_new`: nobody can have it yet. Raises StoryBusy where somebody has it.
        """
        number = await self._claim(name, is_new=is_new)
        if number is None:
            raise StoryBusy(f"{name} is being worked on: wait for its end, or cancel it")
        try:
            yield number
        finally:
            if not is_kept():
                await self.release(name, number)

    @contextlib.asynccontextmanager
    async def wait_for(self, name: str) -> AsyncIterator[None]:
        """Hold a lease within the context, after the present holder."""
        while (number := await self._claim(name)) is None:
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            await self.release(name, number)

    async def release(self, name: str, number: int) -> None:
        """Give a lease back. Does nothing where it is another one by now."""
        if self._held.get(name) == number:
            del self._held[name]
            try:
                await uninterrupted(self._ledger.release(name, number))
            except Exception as failure:  # then it expires
                logger.warning("the lease on %s is not given back: %s", name, describe(failure))

    def abandon(self, name: str) -> None:
        """Hold a lease no longer, and let it expire in the ledger: another front recovers the story then."""
        self._held.pop(name, None)

    async def _claim(self, name: str, *, is_new: bool = False) -> int | None:
        number = None if name in self._held else await self._ledger.claim(self.front, name, is_new=is_new)
        if number is not None:
            self._held[name] = number
        return number
