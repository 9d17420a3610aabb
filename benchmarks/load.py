"""What the benches ask for, and what came when."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minigpt5.config import ModelConfig
from minigpt5.types import StoryRequest

WHO = ("fox", "owl", "bear", "cat", "dog", "duck", "frog", "lion", "mouse", "panda", "pig", "rabbit")
WHAT = ("balloon", "tent", "rocket", "tulip", "bicycle", "umbrella", "castle", "banana")
P99_SAMPLES = 300
"""Fewer say nothing about one in a hundred."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for."""

    pages: int = 4
    page_tokens: int = 48
    steps: tuple[int, ...] = (20, 4, 50)
    """The first is the one that the ratios are of."""
    concurrent: tuple[int, ...] = (1, 4, 16)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    long_prompt_tokens: int = 6000
    num_baseline: int = 2
    """Stories of the published loop that are timed; it takes them one after another."""

    def sizes(self) -> list[tuple[int, list[int]]]:
        """How many stories at once, by steps: all that there are at the first, the least and the most at the others."""
        return [
            (steps, list(self.concurrent) if steps == self.steps[0] else sorted({1, max(self.concurrent)}))
            for steps in self.steps
        ]

    def story(self, index: int, config: ModelConfig, *, steps: int) -> StoryRequest:
        """No two alike, so that no cache answers."""
        sampling = dataclasses.replace(
            config.sampling, min_page_tokens=self.page_tokens, max_page_tokens=self.page_tokens
        )
        return StoryRequest(
            prompt=(f"A {WHO[index % len(WHO)]} who finds a {WHAT[index // len(WHO) % len(WHAT)]}",),
            pages=self.pages,
            seed=1000 + index,
            sampling=sampling,
            draw=dataclasses.replace(config.draw, steps=steps),
        )


TINY = Load(
    pages=2, page_tokens=6, steps=(2,), concurrent=(1, 2), batch_sizes=(1, 2), long_prompt_tokens=200, num_baseline=1
)


@dataclass
class Timing:
    """When what came of one story, in seconds from the start of its load."""

    start: float
    texts: list[float] = field(default_factory=list)
    pages: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)


def describe_load(seconds: float, timings: Sequence[Timing], load: Load) -> dict[str, object]:
    num = len(timings)
    cadence = [b - a for timing in timings for a, b in zip(timing.pages, timing.pages[1:], strict=False)]
    return {
        "stories_per_s": num / seconds,
        "pictures_per_s": num * load.pages / seconds,
        "text_tokens_per_s": num * load.pages * load.page_tokens / seconds,
        "story_s": spread([timing.pages[-1] - timing.start for timing in timings]),
        "first_text_s": spread([timing.texts[0] - timing.start for timing in timings]),
        "first_picture_s": spread([timing.pictures[0] - timing.start for timing in timings]),
        "page_cadence_s": spread(cadence),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    quantiles = {"p50": 0.5, "p95": 0.95} | ({"p99": 0.99} if len(values) >= P99_SAMPLES else {})
    return {name: float(np.quantile(values, share)) for name, share in quantiles.items()} | {"num": len(values)}
