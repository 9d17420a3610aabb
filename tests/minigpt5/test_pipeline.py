"""MiniGPT5 gives the same results from a script, from inside an event loop, and from its coroutines."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minigpt5.blocking import POLL_S, run_blocking
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.errors import InvalidRequest
from minigpt5.pipeline import MiniGPT5
from minigpt5.story.stream import write_story
from minigpt5.types import (
    DecoderEvent,
    DrawRequest,
    DrawSettings,
    GeneratorEvent,
    PageDone,
    Story,
    StoryEvent,
    StoryRequest,
    TextDelta,
)
from tests.helpers.fakes import make_png
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_mapper
from tests.minigpt5.engine.test_generator import new_generator

DRAW = DrawSettings(steps=3)


@pytest.fixture(scope="module")
def model() -> MiniGPT5:
    config, generator = tiny_config(), new_generator()
    sampling = replace(config.sampling, max_page_tokens=16)  # short pages: the tests are about how they come
    generator.config = replace(generator.config, sampling=sampling)
    return MiniGPT5(generator, DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config)))


def content(story: Story) -> list[tuple[str, bytes | None]]:
    return [(page.text, page.picture.png if page.picture else None) for page in story.pages]


def pixels(story: Story) -> np.ndarray:
    pictures = [page.picture for page in story.pages]
    return np.stack([np.asarray(Image.open(io.BytesIO(one.png)), np.int16) for one in pictures if one])


def wait_until_idle(model: MiniGPT5) -> None:
    deadline = time.monotonic() + 20
    while any(one.num_running + one.num_waiting for one in (model.generator, model.decoder)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_story_is_the_same_inside_a_running_loop(model: MiniGPT5) -> None:
    def write() -> Story:
        return model.write("A fox", pages=2, seed=3, draw=DRAW)

    async def inside() -> tuple[Story, Story]:
        return write(), await model.awrite("A fox", pages=2, seed=3, draw=DRAW)

    write()  # the next ones read the same part of their prompt from the cache
    expected = content(write())
    assert len(expected) == 2 and all(png for _, png in expected)
    blocking, awaited = asyncio.run(inside())
    assert content(blocking) == content(awaited) == expected


def test_vokens_pictures_and_descriptions_are_the_same_inside_a_running_loop(model: MiniGPT5) -> None:
    picture = make_png(size=(32, 32))

    def make() -> tuple[bytes, bytes, str]:
        vokens = model.vokens("a fox in the snow")
        return vokens.hidden_VH.tobytes(), model.draw(vokens, 5, settings=DRAW).png, model.describe(picture)

    async def inside() -> tuple[bytes, bytes, str]:
        return make()

    async def awaited() -> tuple[bytes, bytes, str]:
        vokens = await model.avokens("a fox in the snow")
        drawn = await model.adraw(vokens, 5, settings=DRAW)
        return vokens.hidden_VH.tobytes(), drawn.png, await model.adescribe(picture)

    assert make() == asyncio.run(inside()) == asyncio.run(awaited())


def test_stories_that_are_written_at_once_are_what_each_is_alone(model: MiniGPT5) -> None:
    async def together() -> list[Story]:
        return await asyncio.gather(*(model.awrite("An owl", pages=1, seed=seed, draw=DRAW) for seed in range(3)))

    alone = [model.write("An owl", pages=1, seed=seed, draw=DRAW) for seed in range(3)]
    for one, other in zip(asyncio.run(together()), alone, strict=True):
        assert [page.text for page in one.pages] == [page.text for page in other.pages]
        # What docs/batch-invariance.md promises of pictures that share steps.
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_events_come_in_order_and_from_inside_a_loop_too(model: MiniGPT5) -> None:
    async def inside() -> tuple[list[StoryEvent], list[StoryEvent]]:
        blocking: list[StoryEvent] = []
        awaited: list[StoryEvent] = []
        model.write("A fox", pages=1, seed=3, draw=DRAW, on_event=blocking.append)
        await model.awrite("A fox", pages=1, seed=3, draw=DRAW, on_event=awaited.append)
        return blocking, awaited

    blocking, awaited = asyncio.run(inside())
    assert [type(event) for event in blocking] == [type(event) for event in awaited] and len(blocking) > 5


def test_what_cannot_be_written_is_refused_in_every_way(model: MiniGPT5) -> None:
    async def blocking() -> Story:
        return model.write(" ")

    for refused in (lambda: model.write(" "), lambda: asyncio.run(blocking()), lambda: asyncio.run(model.awrite(" "))):
        with pytest.raises(InvalidRequest, match="prompt is empty"):
            refused()
    for prompt in ("caf\udce9", "half \ud83e"):
        with pytest.raises(InvalidRequest, match="prompt .* half of a surrogate pair"):
            model.write(prompt)
        with pytest.raises(InvalidRequest, match="prompt .* half of a surrogate pair"):
            model.vokens(prompt)
    with pytest.raises(InvalidRequest, match="no distilled UNet"):
        model.write("A fox", draw=replace(DRAW, scheduler="distilled", guidance_scale=1.0))


def test_a_cancelled_story_stops_the_engines(model: MiniGPT5) -> None:
    async def cancel() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(
            model.awrite("A fox", pages=8, seed=1, draw=DrawSettings(steps=50), on_event=lambda event: begun.set())
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_until_idle(model)


@pytest.mark.parametrize("is_inside", [False, True])
def test_ctrl_c_stops_the_engines(model: MiniGPT5, is_inside: bool) -> None:
    def press(event: StoryEvent) -> None:
        if not pressed.is_set():
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)

    def write() -> Story:
        return model.write("A fox", pages=8, seed=1, draw=DrawSettings(steps=50), on_event=press)

    async def inside() -> Story:
        # As in IPython's kernel, which runs cells in a loop.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return write()

    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(inside()) if is_inside else write()
    finally:
        signal.signal(signal.SIGINT, before)
    wait_until_idle(model)


def test_first_ctrl_c_stops_a_call_inside_asyncio_run(model: MiniGPT5) -> None:
    """asyncio.run only cancels the main task then, which waits inside the call and cannot notice."""

    async def main() -> None:
        model.write("A fox", pages=8, seed=1, draw=DrawSettings(steps=100), on_event=press)

    def press(event: StoryEvent) -> None:
        assert not isinstance(event, PageDone), "the story went on to its first picture"
        if not pressed.is_set():
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)

    pressed = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    wait_until_idle(model)


def test_ctrl_c_is_heard_at_every_moment_of_a_silent_call() -> None:
    """The signal comes as the caller waits, also just when a wait ends."""

    async def main() -> None:
        threading.Timer(2 * POLL_S, os.kill, (os.getpid(), signal.SIGINT)).start()
        run_blocking(lambda report: asyncio.sleep(30))

    for _ in range(8):
        began_at = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
        assert time.monotonic() - began_at < 10


@pytest.mark.parametrize("way", ["outside", "inside", "awaited"])
def test_listener_that_raises_stops_the_engines(model: MiniGPT5, way: str) -> None:
    def fail(event: StoryEvent) -> None:
        raise LookupError("no such shelf")

    settings = {"pages": 8, "seed": 1, "draw": DrawSettings(steps=100), "on_event": fail_at_text(fail)}

    async def inside() -> None:
        model.write("A fox", **settings)  # type: ignore[arg-type]

    async def awaited() -> None:
        with pytest.raises(LookupError) as caught:  # whose traceback keeps the story's frames
            await model.awrite("A fox", **settings)  # type: ignore[arg-type]
        await asyncio.to_thread(wait_until_idle, model)
        raise caught.value

    ways = {
        "outside": lambda: model.write("A fox", **settings),  # type: ignore[arg-type]
        "inside": lambda: asyncio.run(inside()),
        "awaited": lambda: asyncio.run(awaited()),
    }
    with pytest.raises(LookupError, match="no such shelf"):
        ways[way]()
    wait_until_idle(model)


def test_listener_that_raises_closes_the_generator_at_once() -> None:
    is_closed = False

    async def generate(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        nonlocal is_closed
        try:
            yield TextDelta(page=1, text="Once")
            await asyncio.sleep(60)
        finally:
            is_closed = True

    def fail(event: StoryEvent) -> None:
        raise LookupError("no such shelf")

    async def main() -> None:
        with pytest.raises(LookupError):
            await write_story(StoryRequest(prompt=("A fox",)), generate, never_decode, on_event=fail_at_text(fail))
        assert is_closed

    def never_decode(request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        raise AssertionError("there is nothing to draw")

    asyncio.run(main())


def fail_at_text(fail: Callable[[StoryEvent], None]) -> Callable[[StoryEvent], None]:
    return lambda event: fail(event) if isinstance(event, TextDelta) else None


def test_events_are_heard_in_the_callers_thread(model: MiniGPT5) -> None:
    """Widgets and databases belong to a thread."""
    threads: set[int] = set()

    async def inside() -> None:
        model.write("A fox", pages=1, seed=3, draw=DRAW, on_event=lambda event: threads.add(threading.get_ident()))

    asyncio.run(inside())
    assert threads == {threading.get_ident()}


def test_what_a_coroutine_raises_comes_through() -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def inside() -> None:
        run_blocking(lambda report: fail())

    for way in (lambda: run_blocking(lambda report: fail()), lambda: asyncio.run(inside())):
        with pytest.raises(KeyError, match="x"):
            way()


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_counts_steps_where_it_is_asked_for(
    model: MiniGPT5, progress: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model.write("A fox", pages=2, seed=3, draw=DRAW, progress=progress)
    shown = capsys.readouterr().err
    assert ("6/6" in shown and "page 2: drawing" in shown) == (progress is True)
    assert shown or progress is not True
