"""Events in any order become one ordered story."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random

from minigpt5.codec import from_json, to_json
from minigpt5.story.state import StoryBuilder, StoryState
from minigpt5.story.stream import page_seed, stream_story, write_story
from minigpt5.types import (
    DrawSettings,
    Page,
    PageDone,
    Picture,
    PictureFailed,
    SlotOpened,
    Story,
    StoryEvent,
    StoryRequest,
    StoryStarted,
    TextDelta,
    Usage,
)
from tests.helpers.fakes import FakeDecoder, FakeGenerator, make_png

REQUEST = StoryRequest(prompt=("A fox", "and a balloon"), pages=3, seed=7, draw=DrawSettings(steps=4))


def picture(page: int) -> Picture:
    return Picture(page=page, png=make_png(), width=16, height=16, seed=page_seed(7, page), denoise_steps=4)


def done(page: int) -> PageDone:
    return PageDone(page=Page(index=page, text=f"Page {page}.", picture=picture(page)))


def test_pages_are_ordered_however_they_arrive() -> None:
    events: list[StoryEvent] = [done(1), done(2), done(3), Usage(prompt_tokens=5, completion_tokens=9)]
    for seed in range(6):
        builder = StoryBuilder(REQUEST, story_id="story_1", model="storybook")
        for event in random.Random(seed).sample(events, len(events)):
            builder.add(event)
        story = builder.story()
        assert [page.index for page in story.pages] == [1, 2, 3]
        assert story.usage.completion_tokens == 9
        assert story.num_denoise_steps == 12
        assert (story.id, story.model, story.prompt) == ("story_1", "storybook", "A fox and a balloon")


def test_a_partly_done_story_says_how_far_it_is() -> None:
    builder = StoryBuilder(REQUEST, story_id="story_1")
    for event in (
        StoryStarted(story_id="story_1", seed=7),
        TextDelta(page=1, text="Once "),
        TextDelta(page=1, text="upon. "),
        SlotOpened(page=1),
        TextDelta(page=2, text="Then"),
        picture(1),
    ):
        builder.add(event)
    state = builder.state()
    assert (state.status, state.num_pages, state.num_images, state.num_denoise_steps) == ("drawing", 3, 1, 4)
    assert [(page.text, page.image is not None) for page in state.pages] == [("Once upon.", True), ("Then", False)]


def test_a_failed_picture_keeps_its_page() -> None:
    builder = StoryBuilder(REQUEST)
    builder.add(TextDelta(page=1, text="Once"))
    builder.add(PictureFailed(page=1, error="no memory"))
    assert builder.state().pages[0].error == "no memory"
    builder.add(PageDone(page=Page(index=1, text="Once", error="no memory")))
    assert builder.story().pages[0] == Page(index=1, text="Once", error="no memory")


def test_previous_pages_stay_in_front() -> None:
    request = dataclasses.replace(REQUEST, pages=1, previous=(Page(index=1, text="Before."),))
    builder = StoryBuilder(request)
    builder.add(done(2))
    assert [page.index for page in builder.story().pages] == [1, 2]
    assert builder.state().num_pages == 2


def test_a_state_survives_json() -> None:
    builder = StoryBuilder(REQUEST, story_id="story_1", created=3)
    builder.add(done(1))
    builder.add(PageDone(page=Page(index=2, text="Two", error="broke")))
    state = builder.state("failed", error="why")
    assert from_json(StoryState, json.loads(json.dumps(to_json(state)))) == state


def test_the_builder_and_write_story_agree() -> None:
    async def build() -> Story:
        builder = StoryBuilder(REQUEST, story_id="story_1", model="storybook")
        async for event in stream_story(REQUEST, FakeGenerator().generate, FakeDecoder().decode):
            builder.add(event)
        return builder.story()

    async def write() -> Story:
        engines = FakeGenerator().generate, FakeDecoder().decode
        return await write_story(REQUEST, *engines, story_id="story_1", model="storybook")

    built = asyncio.run(build())
    assert built == asyncio.run(write())
    assert [page.text for page in built.pages] == ["Page 1 of 7.", "Page 2 of 7.", "Page 3 of 7."]
