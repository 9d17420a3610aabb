"""The ledger of several fronts, behind a Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.stories.admission import Load
from deployments.stories.events import StreamEvent
from deployments.stories.ledger import EventSlice, Instructions
from minigpt5.errors import EngineLost

TIMEOUT_S = 10.0
TRIES = 20
PAUSE_S = 0.5


class ServeLedger:
    """The ledger of several fronts, behind Serve's handle; see deployments.stories.ledger.Ledger."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def heartbeat(self, front: str, held: Mapping[str, int], load: Load) -> Instructions:
        return await self._ask("heartbeat", front, held, load)

    async def claim(self, front: str, name: str, *, is_new: bool = False) -> int | None:
        return await self._ask("claim", front, name, is_new=is_new)

    async def release(self, name: str, number: int) -> None:
        await self._ask("release", name, number)

    async def cancel(self, name: str) -> bool:
        return await self._ask("cancel", name)

    async def begin(self, front: str, client: str, *, per_minute: int, concurrent: int) -> float:
        return await self._ask("begin", front, client, per_minute=per_minute, concurrent=concurrent)

    async def end(self, front: str, client: str) -> None:
        await self._ask("end", front, client)

    async def read(self, name: str, start: int) -> EventSlice | None:
        return await self._ask("read", name, start)

    async def publish(self, name: str, number: int, start: int, events: Sequence[StreamEvent]) -> bool:
        return await self._ask("publish", name, number, start, events)

    async def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the ledger, and again where the ledger dies. Each may be called twice, because the next
        ledger does not know what the dead one has granted."""
        for attempt in range(TRIES):
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return await getattr(self._handle, method).remote(*arguments, **options)
            except (RayActorError, TimeoutError) as failure:  # Serve starts another one
                if attempt == TRIES - 1:
                    raise EngineLost("the fronts' ledger does not answer") from failure
                await asyncio.sleep(PAUSE_S)
