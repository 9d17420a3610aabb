"""Ours: both engines in one process, stories at once, and the pipeline bound of a lone one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.engine_pair import Engines
from benchmarks.load import Load, Timing, describe_load
from minigpt5.story.stream import page_seed, stream_story
from minigpt5.types import DrawRequest, PageDone, Picture, StoryRequest, TextDelta, Vokens


class Ours:
    """What the bench asks both engines for."""

    def __init__(self, engines: Engines, load: Load) -> None:
        self.engines, self.load = engines, load

    def stories(self, pictures: str, num: int) -> dict[str, Any]:
        """Figures of `num` stories at once."""
        stories = self.engines.new_stories(num, self.load, pictures=pictures)
        return describe_load(*asyncio.run(write_at_once(self.engines, stories)), self.load)

    def bound(self, pictures: str) -> float:
        """Seconds of the pipeline bound."""
        (story,) = self.engines.new_stories(1, self.load, pictures=pictures)
        return asyncio.run(measure_bound(self.engines, story))

    def counters(self) -> dict[str, int]:
        generator = self.engines.generator
        return {
            "close_choices": generator.num_close_choices,
            "prompt_tokens": generator.num_prompt_tokens,
            "reused_prompt_tokens": generator.num_reused_tokens,
        }


async def write_at_once(engines: Engines, requests: Sequence[StoryRequest]) -> tuple[float, list[Timing]]:
    """Seconds until all are done, and each one's own times."""
    began = time.perf_counter()

    async def one(request: StoryRequest) -> Timing:
        timing = Timing(start=time.perf_counter() - began)
        async for event in stream_story(request, engines.generator.generate, engines.decoder.decode):
            now = time.perf_counter() - began
            if isinstance(event, TextDelta):
                timing.texts.append(now)
            elif isinstance(event, Picture):
                timing.pictures.append(now)
            elif isinstance(event, PageDone):
                assert event.page.error is None, event.page.error
                timing.pages.append(now)
        return timing

    timings = await asyncio.gather(*map(one, requests))
    return time.perf_counter() - began, list(timings)


async def measure_bound(engines: Engines, request: StoryRequest) -> float:
    """The shortest time of a story whose pictures are drawn while its text goes on: stages measured alone."""
    began = last = time.perf_counter()
    text_s, vokens = [], []
    async for event in engines.generator.generate(request):
        if isinstance(event, Vokens):
            vokens.append(event)
            text_s.append(time.perf_counter() - last)
            last = time.perf_counter()
    assert last > began
    draw_s = []
    for one in vokens:
        began = time.perf_counter()
        seed = page_seed(request.seed, one.page) + 1  # not the picture that is drawn again when the whole is measured
        async for _ in engines.decoder.decode(DrawRequest(vokens=one, seed=seed, settings=request.draw)):
            pass
        draw_s.append(time.perf_counter() - began)
    return max(sum(text_s[: k + 1]) + sum(draw_s[k:]) for k in range(len(text_s)))
