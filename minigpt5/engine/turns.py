"""Turns at an engine that has its own scheduler: a few requests at once, and no client waits for another's many.

The torch engine divides every step (fair_share.py). Where the steps are not ours, the entries are: one text or one
picture's vokens is a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator


class Turns:
    """`places` turns at once. All calls are made in one event loop."""

    def __init__(self, places: int, *, reserved: int = 0) -> None:
        """`reserved` places are left to clients that have no turn under way."""
        self.places, self.reserved = places, min(reserved, places - 1)
        self._running: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Wait for a turn of client `key`, and have it within the context."""
        await self._wait(key)
        try:
            yield
        finally:
            self._end(key)

    async def _wait(self, key: str) -> None:
        entry = key, asyncio.get_running_loop().create_future()
        self._waiting.append(entry)
        self._admit()
        try:
            await entry[1]
        except asyncio.CancelledError:
            if not entry[1].cancelled():  # it was admitted at this moment
                self._end(key)
            elif entry in self._waiting:
                self._waiting.remove(entry)
            raise

    def _end(self, key: str) -> None:
        self._running[key] -= 1
        self._running += Counter()  # keys without turns are forgotten
        self._admit()

    def _admit(self) -> None:
        """The oldest turn of the client with the fewest under way."""
        # A cancelled turn stands here until its task runs.
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        while self._waiting:
            entry = min(self._waiting, key=lambda entry: self._running[entry[0]])
            num_left = self.reserved if self._running[entry[0]] else 0
            if self.places - self.num_running <= num_left:
                return
            self._waiting.remove(entry)
            self._running[entry[0]] += 1
            entry[1].set_result(None)
