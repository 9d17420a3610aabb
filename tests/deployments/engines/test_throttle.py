"""Events that say the same in fewer pieces: joined text, fewer Progress events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import numpy as np
import pytest

from deployments.engines.throttle import coalesce_text, text_interval_s, throttle_progress
from minigpt5.errors import EngineLost
from minigpt5.types import Picture, Progress, TextDelta, Usage, Vokens

VOKENS = Vokens(page=1, hidden_VH=np.zeros((1, 1), np.float32), fingerprint="")
USAGE = Usage(prompt_tokens=1, completion_tokens=1)
TEXTS = [TextDelta(page=1, text=text) for text in "abcd"]
Throttle = Callable[..., AsyncIterator[Any]]


def collect(throttle: Throttle, events: Iterable[Any], *, interval_s: Any, gap_s: float = 0.0) -> list[Any]:
    async def feed() -> AsyncIterator[Any]:
        for event in events:
            await asyncio.sleep(gap_s)
            yield event

    async def main() -> list[Any]:
        return [event async for event in throttle(feed(), interval_s=interval_s)]

    return asyncio.run(main())


def test_the_first_text_is_sent_at_once_and_nothing_overtakes_a_text() -> None:
    events = [*TEXTS, VOKENS, TextDelta(page=2, text="e"), TextDelta(page=3, text="f"), USAGE]
    sent = collect(coalesce_text, events, interval_s=lambda: 60)
    assert [event.text if isinstance(event, TextDelta) else event for event in sent] == [
        "a",
        "bcd",
        VOKENS,
        "e",
        "f",
        USAGE,
    ]


def test_many_requests_have_fewer_pieces_of_text_each() -> None:
    assert text_interval_s(1) == text_interval_s(5) == 0.1
    assert text_interval_s(16) == pytest.approx(0.32)
    assert text_interval_s(100) == 0.5


def test_held_text_is_sent_when_the_stream_ends() -> None:
    assert [event.text for event in collect(coalesce_text, TEXTS, interval_s=lambda: 60)] == ["a", "bcd"]


def test_slow_texts_are_sent_each_by_itself() -> None:
    assert collect(coalesce_text, TEXTS, interval_s=lambda: 0.001, gap_s=0.005) == TEXTS


def test_held_text_is_sent_while_the_stream_stalls() -> None:
    async def main() -> list[Any]:
        async def feed() -> AsyncIterator[Any]:
            for event in TEXTS:
                yield event
            await asyncio.Event().wait()  # for ever

        sent = []
        async with asyncio.timeout(5):
            async for event in coalesce_text(feed(), interval_s=lambda: 0.02):
                sent.append(event.text)
                if "".join(sent) == "abcd":
                    return sent
        raise AssertionError("the stream has ended")

    assert asyncio.run(main()) == ["a", "bcd"]


def test_text_is_sent_at_most_once_in_an_interval() -> None:
    async def main() -> list[float]:
        async def feed() -> AsyncIterator[Any]:
            for _ in range(40):
                await asyncio.sleep(0.002)
                yield TEXTS[0]

        clock = asyncio.get_running_loop().time
        return [clock() async for _ in coalesce_text(feed(), interval_s=lambda: 0.02)]

    *times, _ = asyncio.run(main())  # the last is sent as the stream ends
    assert all(later - earlier >= 0.019 for earlier, later in zip(times, times[1:], strict=False))
    assert len(times) >= 3


def test_an_error_passes_and_a_reader_that_leaves_stops_the_stream() -> None:
    async def main() -> None:
        closed: list[str] = []

        async def feed(*, fails: bool) -> AsyncIterator[Any]:
            try:
                yield TEXTS[0]
                if fails:
                    raise EngineLost("gone")
                await asyncio.Event().wait()
            finally:
                closed.append("fed")

        with pytest.raises(EngineLost, match="gone"):
            [event async for event in coalesce_text(feed(fails=True))]
        async for event in (events := coalesce_text(feed(fails=False))):
            assert event == TEXTS[0]
            await events.aclose()  # type: ignore[attr-defined]
        assert closed == ["fed", "fed"]

    asyncio.run(main())


def test_the_first_and_the_last_step_and_previews_are_sent() -> None:
    steps = [Progress(page=1, step=n, steps=9, preview=b"j" if n == 5 else None) for n in range(1, 10)]
    picture = Picture(page=1, png=b"", width=1, height=1, seed=0, denoise_steps=9)
    sent = collect(throttle_progress, [*steps, picture], interval_s=60)
    assert [getattr(event, "step", "picture") for event in sent] == [1, 5, 9, "picture"]
    assert len(collect(throttle_progress, steps, interval_s=0.001, gap_s=0.005)) == 9
