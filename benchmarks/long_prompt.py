"""Gaps between the texts of running stories while a long prompt joins them."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np

from benchmarks.engine_pair import Engines
from benchmarks.load import DEFAULT, Load
from minigpt5.types import StoryRequest, TextDelta

CONTEXT_TOKENS = 8192
COMPANY = 4
"""Stories under way when a long prompt joins."""


async def measure_token_gaps(engines: Engines, load: Load) -> dict[str, float]:
    """Gaps between the texts of running stories, without and with a long prompt that joins them."""
    figures = {}
    for name in ("without", "with"):
        stories = engines.new_stories(COMPANY, load, pictures=DEFAULT)
        arrivals: list[list[float]] = []
        is_reading = asyncio.Event()

        async def write(
            request: StoryRequest, arrivals: list[list[float]] = arrivals, started: asyncio.Event = is_reading
        ) -> None:
            times: list[float] = []
            arrivals.append(times)
            async for event in engines.generator.generate(request):
                if isinstance(event, TextDelta):
                    times.append(time.perf_counter())
                    started.set()

        running = [asyncio.create_task(write(story)) for story in stories]
        await is_reading.wait()
        joining = None
        if name == "with":
            words = " and a fox" * (load.long_prompt_tokens // 3)
            request = dataclasses.replace(stories[0], prompt=(words,), pages=1)
            joining = asyncio.create_task(write(request, [], is_reading))
        await asyncio.gather(*running)
        if joining:
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            while engines.generator.num_running:  # it leaves at the next step
                await asyncio.sleep(0.01)
        gaps = [b - a for times in arrivals for a, b in zip(times, times[1:], strict=False)]
        figures[f"p95_{name}_s"] = float(np.quantile(gaps, 0.95))
    return {**figures, "ratio": figures["p95_with_s"] / figures["p95_without_s"]}
