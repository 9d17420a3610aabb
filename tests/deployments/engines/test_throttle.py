"""Fewer events say the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np

from deployments.engines.throttle import coalesce_text, throttle_progress
from minigpt5.types import Picture, Progress, TextDelta, Usage, Vokens

VOKENS = Vokens(page=1, hidden_VH=np.zeros((1, 1), np.float32), fingerprint="")
USAGE = Usage(prompt_tokens=1, completion_tokens=1)


def collect(make: Any, events: Iterable[Any], *, interval_s: float, gap_s: float = 0.0) -> list[Any]:
    async def feed() -> AsyncIterator[Any]:
        for event in events:
            await asyncio.sleep(gap_s)
            yield event

    async def main() -> list[Any]:
        return [event async for event in make(feed(), interval_s=interval_s)]

    return asyncio.run(main())


def test_the_first_text_goes_at_once_and_nothing_overtakes_a_text() -> None:
    words = [TextDelta(page=1, text=word) for word in "abcd"]
    events = [*words, VOKENS, TextDelta(page=2, text="e"), TextDelta(page=3, text="f"), USAGE]
    paced = collect(coalesce_text, events, interval_s=60)
    assert [event.text if isinstance(event, TextDelta) else event for event in paced] == [
        "a",
        "bcd",
        VOKENS,
        "e",
        "f",
        USAGE,
    ]
    assert collect(coalesce_text, words, interval_s=60)[-1].text == "bcd"


def test_slow_texts_go_each_by_itself() -> None:
    words = [TextDelta(page=1, text=word) for word in "abcd"]
    assert collect(coalesce_text, words, interval_s=0.001, gap_s=0.005) == words


def test_the_first_and_the_last_step_and_previews_are_told() -> None:
    steps = [Progress(page=1, step=n, steps=9, preview=b"j" if n == 5 else None) for n in range(1, 10)]
    picture = Picture(page=1, png=b"", width=1, height=1, seed=0, denoise_steps=9)
    paced = collect(throttle_progress, [*steps, picture], interval_s=60)
    assert [getattr(event, "step", "picture") for event in paced] == [1, 5, 9, "picture"]
    assert len(collect(throttle_progress, steps, interval_s=0.001, gap_s=0.005)) == 9
