"""What an engine of this process streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import TypeVar

R = TypeVar("R")
E = TypeVar("E")


def run_together(stream: Callable[[R], AsyncGenerator[E, None]], requests: Iterable[R]) -> list[list[E]]:
    """The events of each request, all of them asked for at once."""

    async def collect(request: R) -> list[E]:
        return [event async for event in stream(request)]

    async def together() -> list[list[E]]:
        return await asyncio.gather(*map(collect, requests))

    return asyncio.run(together())
