"""The flow with fakes at the two engine faces: order, overlap, failures."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Literal

import numpy as np
import pytest

from minigpt5.story.characters import is_named, shown_on
from minigpt5.story.state import StoryBuilder
from minigpt5.story.stream import Generate, page_seed, stream_story, write_story
from minigpt5.types import (
    NUM_PREVIEWS,
    Character,
    DecoderEvent,
    DrawRequest,
    GeneratorEvent,
    InputImage,
    PageDone,
    Picture,
    PictureFailed,
    Progress,
    SlotOpened,
    Story,
    StoryEvent,
    StoryRequest,
    StoryStarted,
    TextDelta,
    Usage,
    Vokens,
)


async def generate(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
    for page in range(1, request.pages + 1):
        for word in (f"Page {page}", " goes on."):
            yield TextDelta(page=page, text=word)
            await asyncio.sleep(0)
        yield Vokens(page=page, hidden_VH=np.zeros((8, 4), np.float32), fingerprint="x")
    yield Usage(prompt_tokens=3, completion_tokens=4)


async def decode(request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
    page = request.vokens.page
    await asyncio.sleep(0.02 / page)
    yield Progress(page=page, step=1, steps=1)
    if page == 2 and request.settings.steps == 13:
        raise RuntimeError("no ink")
    yield Picture(page=page, png=b"png", width=1, height=1, seed=request.seed, denoise_steps=1)


def collect(request: StoryRequest) -> list[StoryEvent]:
    async def run() -> list[StoryEvent]:
        return [event async for event in stream_story(request, generate, decode)]

    return asyncio.run(run())


def test_pictures_that_are_read_back_come_before_the_next_page() -> None:
    asked: list[StoryRequest] = []

    async def generate_one(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        asked.append(request)
        page = len(request.previous) + 1
        yield TextDelta(page=page, text=f"Page {page}.")
        yield Vokens(page=page, hidden_VH=np.zeros((8, 4), np.float32), fingerprint="x")
        yield Usage(prompt_tokens=3, completion_tokens=page)

    async def run() -> Story:
        request = StoryRequest(prompt=("x",), pages=3, seed=4, feedback="pictures", given=("Page 1.",))
        return await write_story(request, generate_one, decode)

    story = asyncio.run(run())
    assert [page.text for page in story.pages] == ["Page 1.", "Page 2.", "Page 3."]
    assert [(request.pages, request.num_later, len(request.given)) for request in asked] == [
        (1, 2, 1),
        (1, 1, 0),
        (1, 0, 0),
    ]
    assert [[page.picture is not None for page in request.previous] for request in asked] == [[], [True], [True, True]]
    assert asked[2].previous == story.pages[:2]
    assert story.usage == Usage(prompt_tokens=9, completion_tokens=6)


def test_a_request_carries_the_pictures_of_a_window_however_long_the_story_is() -> None:
    carried: list[list[bool]] = []

    async def generate_one(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        carried.append([bool(page.picture and page.picture.png) for page in request.previous])
        assert all(page.picture for page in request.previous)
        page = len(request.previous) + 1
        yield TextDelta(page=page, text=f"Page {page}.")
        yield Vokens(page=page, hidden_VH=np.zeros((8, 4), np.float32), fingerprint="x")

    request = StoryRequest(prompt=("x",), pages=40, feedback="pictures")
    story = asyncio.run(write_story(request, generate_one, decode))
    assert all(page.picture and page.picture.png for page in story.pages)
    assert all(carried[15]) and len(carried[15]) == 15
    assert [page for page, is_there in enumerate(carried[39], start=1) if is_there] == [1, 2, *range(25, 40)]


def test_text_is_in_order_and_every_page_is_done_once() -> None:
    events = collect(StoryRequest(prompt=("x",), pages=3, seed=4))
    assert isinstance(events[0], StoryStarted)
    assert [event.page for event in events if isinstance(event, TextDelta)] == [1, 1, 2, 2, 3, 3]
    assert [event.page for event in events if isinstance(event, SlotOpened)] == [1, 2, 3]
    assert sorted(event.page.index for event in events if isinstance(event, PageDone)) == [1, 2, 3]


def test_text_goes_on_while_pictures_are_drawn() -> None:
    events = collect(StoryRequest(prompt=("x",), pages=3))
    last_text = max(i for i, event in enumerate(events) if isinstance(event, TextDelta))
    first_picture = min(i for i, event in enumerate(events) if isinstance(event, Picture))
    assert last_text < first_picture


def test_a_failed_picture_is_data_on_its_page() -> None:
    from minigpt5.types import DrawSettings

    request = StoryRequest(prompt=("x",), pages=3, draw=DrawSettings(steps=13))
    story = asyncio.run(write_story(request, generate, decode))
    assert [page.error for page in story.pages] == [None, "no ink", None]
    assert any(isinstance(event, PictureFailed) for event in collect(request))
    assert story.pages[1].text == "Page 2 goes on."


def test_a_failed_generator_raises() -> None:
    async def broken(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        yield TextDelta(page=1, text="a")
        raise RuntimeError("out of words")

    async def run() -> None:
        await write_story(StoryRequest(prompt=("x",)), broken, decode)

    with pytest.raises(RuntimeError, match="out of words"):
        asyncio.run(run())


@pytest.mark.parametrize("feedback", ["text", "pictures"])
def test_for_consistency_each_later_page_has_the_first_as_its_reference(feedback: Literal["text", "pictures"]) -> None:
    asked: list[DrawRequest] = []

    async def note(request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        asked.append(request)
        async for event in decode(request):
            yield event

    async def one_by_one(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        first = len(request.previous)
        async for event in generate(request):
            yield event if isinstance(event, Usage) else dataclasses.replace(event, page=event.page + first)  # type: ignore[type-var]

    request = StoryRequest(prompt=("x",), pages=3, seed=4, feedback=feedback)
    asyncio.run(write_story(request, one_by_one, note))
    assert [one.reference for one in asked] == [None, None, None]
    asked.clear()
    asyncio.run(write_story(dataclasses.replace(request, consistency="story"), one_by_one, note))
    first, *later = sorted(asked, key=lambda one: one.vokens.page)
    assert first.reference is None and len(later) == 2
    for one in later:
        assert one.reference and one.reference.vokens is first.vokens and one.reference.seed == first.seed


def test_a_page_shows_the_characters_that_it_names_else_those_of_the_page_before() -> None:
    fox, owl, mia = (Character(name=name, image=InputImage(data=name.encode())) for name in ("Fox", "owl", "Mia (5)"))
    characters = (fox, owl, mia)
    texts = [
        "Once upon a time.",
        "A fox met an OWL.",
        "They sang.",
        "A foxglove grew.",
        "Mia (5) came.",
        "The owl left.",
    ]
    expected = [characters, (fox, owl), (fox, owl), (fox, owl), (mia,), (owl,)]
    for page, shown in enumerate(expected, start=1):
        assert shown_on(texts[:page], characters) == tuple(one.image for one in shown), page
    assert shown_on(texts, ()) == ()


@pytest.mark.parametrize(
    ("name", "text", "is_there"),
    [
        ("小明", "小明走进了森林。", True),
        ("小红", "小明走进了森林。", False),
        ("ミア", "森でミアは歌った。", True),
        ("미아", "미아는 숲으로 갔다.", True),
        ("미아", "개미아저씨가 왔다.", False),
        ("José", "Then Jose\u0301 sings.", True),
        ("Jose", "Then Jose\u0301 sings.", False),
        ("राम", "रामू घर गया।", False),
        ("राम", "राम घर गया।", True),
        ("สมชาย", "วันนี้สมชายไปตลาด", True),
        ("Ana", "ANA's house", True),
        ("Ana", "Anatole", False),
        ("Mia (5)", "Mia (5), came", True),
    ],
)
def test_a_name_is_found_in_the_words_of_its_script(name: str, text: str, is_there: bool) -> None:
    assert is_named(name, text) == is_there


def test_closing_the_stream_closes_both_engines() -> None:
    closed = []

    async def endless(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        try:
            while True:
                yield TextDelta(page=1, text="la ")
                await asyncio.sleep(0)
        finally:
            closed.append("generator")

    async def run() -> None:
        stream = stream_story(StoryRequest(prompt=("x",)), endless, decode)
        async for event in stream:
            if isinstance(event, TextDelta):
                break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert closed == ["generator"]


def test_page_seeds_differ_and_depend_on_seed_and_page_only() -> None:
    assert page_seed(7, 1) == page_seed(7, 1)
    assert len({page_seed(seed, page) for seed in range(20) for page in range(1, 5)}) == 80


def test_a_reply_may_have_any_number_of_pages_and_end_with_text() -> None:
    async def answer(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        for page in (1, 2):
            yield TextDelta(page=page, text=f" Picture {page}:")
            yield Vokens(page=page, hidden_VH=np.zeros((8, 4), np.float32), fingerprint="x")
        yield TextDelta(page=3, text=" That is all. ")
        yield Usage(prompt_tokens=3, completion_tokens=4)

    async def silent(request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        yield TextDelta(page=1, text=" ")
        yield Usage(prompt_tokens=3, completion_tokens=1)

    request = StoryRequest(prompt=("x",), mode="reply", pages=5)
    builder = StoryBuilder(request)

    async def run(generate: Generate) -> Story:
        return await write_story(request, generate, decode, on_event=builder.add)

    story = asyncio.run(run(answer))
    assert [page.text for page in story.pages] == ["Picture 1:", "Picture 2:", "That is all."]
    assert [page.picture is not None for page in story.pages] == [True, True, False]
    assert [page.error for page in story.pages] == [None] * 3
    assert builder.story().pages == story.pages
    assert asyncio.run(run(silent)).pages == ()


def test_pictures_are_asked_for_in_the_name_of_the_story() -> None:
    asked: list[DrawRequest] = []

    async def listen(request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        asked.append(request)
        async for event in decode(request):
            yield event

    request = StoryRequest(prompt=("x",), pages=2, key="ada", previews=True)
    asyncio.run(write_story(request, generate, listen))
    assert [(one.key, one.num_previews, one.seed) for one in asked] == [
        ("ada", NUM_PREVIEWS, page_seed(0, page)) for page in (1, 2)
    ]
