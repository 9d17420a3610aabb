"""The storybook model's application with engines that are slowed down: `benchmarks.slowed:app` in a Serve config.

Replicas of a cluster have hardware of their own, and those of one machine do not. These engines wait most of a page's
time, so that several replicas share two cores and still scale as on a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ray.serve import Application

from deployments.application import AppArgs, wire
from deployments.engines.diffusion_decoder import DiffusionDecoder
from deployments.engines.stage_clock import StageClock
from deployments.engines.voken_generator import VokenGenerator
from minigpt5.types import DecoderEvent, DrawRequest, GeneratorEvent, Picture, StoryRequest, Vokens

TEXT_S, TEXT_BATCH = 3.0, 4
"""Least seconds of a page's text, and pages that a generator writes at once."""
PICTURE_S, PICTURE_BATCH = 6.0, 2
SPEED_UP = 2.0
"""Pages at once do not slow each other down: a wait takes no hardware."""


class _Places:
    """Places of a replica; a request keeps one for at least `least_s`."""

    def __init__(self, num: int, least_s: float) -> None:
        self._free, self._least_s = asyncio.Semaphore(num), least_s

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        async with self._free:
            until = time.monotonic() + self._least_s
            yield
            await asyncio.sleep(until - time.monotonic())


class _SlowGenerator:
    """An engine whose pages take their time."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._places = engine, _Places(TEXT_BATCH, TEXT_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        async with contextlib.aclosing(self._engine.generate(request)) as events:
            for _ in range(request.pages):
                async with self._places.place():
                    page = [event async for event in _up_to(events, Vokens)]
                for event in page:
                    yield event
            async for event in events:
                yield event


class _SlowDecoder:
    """An engine whose pictures take their time."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._places = engine, _Places(PICTURE_BATCH, PICTURE_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        async with contextlib.aclosing(self._engine.decode(request)) as events:
            async with self._places.place():
                drawn = [event async for event in _up_to(events, Picture)]
            for event in drawn:
                yield event


class SlowedGenerator(VokenGenerator):
    """Writes a page in `TEXT_S`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engine = _SlowGenerator(self.engine)  # type: ignore[assignment]
        self.clock = StageClock(TEXT_BATCH, speed_up=SPEED_UP)


class SlowedDecoder(DiffusionDecoder):
    """Draws a picture in `PICTURE_S`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engine = _SlowDecoder(self.engine)  # type: ignore[assignment]
        self.clock = StageClock(PICTURE_BATCH, speed_up=SPEED_UP)


def app(args: dict[str, Any]) -> Application:
    """As `deployments:app`."""
    return wire(AppArgs.model_validate(args), SlowedGenerator, SlowedDecoder)


async def _up_to(events: AsyncIterator[Any], kind: type) -> AsyncIterator[Any]:
    """Events up to the first of a kind."""
    async for event in events:
        yield event
        if isinstance(event, kind):
            return
