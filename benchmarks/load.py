"""What the benches ask for, and what came when."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minigpt5.config import ModelConfig
from minigpt5.types import DrawSettings, Sampling, StoryRequest

WHO = ("fox", "owl", "bear", "cat", "dog", "duck", "frog", "lion", "mouse", "panda", "pig", "rabbit")
WHAT = ("balloon", "tent", "rocket", "tulip", "bicycle", "umbrella", "castle", "banana")
P99_SAMPLES = 300
"""Fewer say nothing about one in a hundred."""
DEFAULT = "default"
"""The pictures of a request that says nothing about them."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for. Every page has `page_tokens` tokens, so that each way of making a story does the same work."""

    pages: int = 4
    page_tokens: int = 48
    stories: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {DEFAULT: (1, 4, 16, 64), "20": (1, 16), "50": (1,)}
    )
    """Pictures -> how many stories at once. Pictures are DEFAULT, or a number of guided steps."""
    repeated: dict[str, tuple[int, ...]] = field(default_factory=lambda: {DEFAULT: (1, 16), "20": (1, 16)})
    """Those of `stories` that the ratios need: they are measured in every round."""
    rounds: int = 3
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """The sweep of the limit."""
    text_tokens: int = 96
    """Tokens of the text that ours and the peers write alone, with no picture drawn."""
    text_at_once: tuple[int, ...] = (1, 16)
    picture_batches: tuple[int, ...] = (1, 8)
    long_prompt_tokens: int = 6000
    """0: no long prompt is measured."""

    def draw(self, pictures: str, config: ModelConfig) -> DrawSettings:
        """How the model draws such pictures."""
        if pictures == DEFAULT:
            return config.default_draw
        return dataclasses.replace(config.draw, steps=int(pictures))

    def story(self, index: int, config: ModelConfig, *, pictures: str) -> StoryRequest:
        """No two alike, so that no cache answers."""
        sampling = dataclasses.replace(
            config.sampling, min_page_tokens=self.page_tokens, max_page_tokens=self.page_tokens
        )
        return StoryRequest(
            prompt=(f"A {WHO[index % len(WHO)]} who finds a {WHAT[index // len(WHO) % len(WHAT)]}",),
            pages=self.pages,
            seed=1000 + index,
            sampling=sampling,
            draw=self.draw(pictures, config),
        )

    def text(self, index: int, config: ModelConfig) -> StoryRequest:
        """One page of greedy text, whose picture is not drawn."""
        sampling = Sampling(temperature=0.0, min_page_tokens=self.text_tokens, max_page_tokens=self.text_tokens)
        return dataclasses.replace(self.story(index, config, pictures=DEFAULT), pages=1, sampling=sampling)


QUICK = Load(
    stories={DEFAULT: (1, 16), "20": (1,)},
    repeated={DEFAULT: (1, 16), "20": (1,)},
    rounds=1,
    batch_sizes=(16,),
    long_prompt_tokens=0,
)
TINY = Load(
    pages=2,
    page_tokens=6,
    stories={DEFAULT: (1, 2, 16), "20": (1, 16)},
    repeated={DEFAULT: (1, 16), "20": (1, 16)},
    rounds=2,
    batch_sizes=(1, 2),
    text_tokens=8,
    long_prompt_tokens=200,
)
LOADS = {"full": Load(), "quick": QUICK, "tiny": TINY}


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
