"""Stories that one front runs, over engines of this process and a real store."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path

import pytest

from deployments.schemas import CreateStory, to_story_request
from deployments.stories.admission import Overloaded
from deployments.stories.leases import StoryBusy
from minigpt5.errors import InvalidRequest
from minigpt5.types import StoryRequest
from tests.helpers.fakes import FakeGenerator
from tests.helpers.served import CONFIG, Served

REQUEST: StoryRequest = to_story_request(CreateStory(prompt="A fox", pages=3, seed=7), CONFIG)


def test_a_story_keeps_its_lease_to_its_end(tmp_path: Path) -> None:
    async def main() -> None:
        front = Served(tmp_path).front
        story = await front.runner.start(REQUEST)
        assert front.runner.find(story.id) is story
        assert front.leases.held == {story.id: story.number}
        with pytest.raises(StoryBusy):
            async with front.leases.exclusive(story.id):
                pass
        names = [event.name async for event in story.follow()]
        assert (names[0], names[-1]) == ("story", "done")
        assert front.runner.find(story.id) is None
        assert front.leases.held == {} and front.store.running() == []
        assert front.admission.num_running == 0

    asyncio.run(main())


def test_a_refused_story_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        front = Served(tmp_path, generator=FakeGenerator(max_words=1), max_running=0).front
        with pytest.raises(Overloaded):
            await front.runner.start(REQUEST)
        front.admission.max_running = 1
        with pytest.raises(InvalidRequest):
            await front.runner.start(REQUEST)
        assert front.admission.num_running == 0
        assert front.leases.held == {}
        assert front.store.list_ids() == [] and front.store.running() == []

    asyncio.run(main())


def test_a_story_is_cancelled_once_however_often_it_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path)
        served.generator.gate.clear()
        front = served.front
        story = await front.runner.start(REQUEST)
        assert await asyncio.gather(*(front.runner.cancel(story.id) for _ in range(3))) == [True] * 3
        assert front.store.load(story.id).status == "cancelled"
        assert not await front.runner.cancel(story.id)
        assert served.generator.num_closed == 1

    asyncio.run(main())


def test_a_lost_story_ends_here_and_not_in_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve")

    async def main() -> None:
        served = Served(tmp_path)
        served.generator.gate.clear()
        front = served.front
        story = await front.runner.start(REQUEST)
        await asyncio.sleep(0.01)
        front.runner.lose(story.id, story.number - 1)  # an earlier lease of the same story
        front.runner.lose("story_none", story.number)
        assert not story.is_lost
        front.runner.lose(story.id, story.number)
        assert [event.name async for event in story.follow()] == ["story"]
        assert front.store.load(story.id).status == "drawing"
        assert front.store.running() == [story.id]  # the mark is its next owner's
        assert front.leases.held == {}

    asyncio.run(main())
    assert [vars(record)["outcome"] for record in caplog.records if "outcome" in vars(record)] == ["handed_over"]


def test_a_story_that_runs_elsewhere_is_not_recovered(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path)
        served.generator.gate.clear()
        front = served.front
        story = await front.runner.start(REQUEST)
        await front.runner.recover(story.id)
        assert len(served.generator.requests) <= 1
        served.generator.gate.set()
        assert [event.name async for event in story.follow()][-1] == "done"

    asyncio.run(main())


def test_a_change_is_made_when_nothing_can_refuse_the_story_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        front = Served(tmp_path).front
        first = await front.runner.start(REQUEST)
        [_ async for _ in first.follow()]
        state = front.store.load(first.id)
        changes: list[str] = []
        front.admission.max_running = 0
        async with front.leases.exclusive(first.id) as lease:
            with pytest.raises(Overloaded):
                await front.runner.resume(state, REQUEST, lease, change=lambda: changes.append("too early"))
            front.admission.max_running = 4
            longer = dataclasses.replace(REQUEST, pages=4)
            story = await front.runner.resume(state, longer, lease, change=lambda: changes.append("made"))
        assert changes == ["made"]
        [_ async for _ in story.follow()]
        assert [page.text for page in front.store.load(first.id).pages][3:] == ["Page 4 of 7."]
        assert front.leases.held == {} and front.store.running() == []

    asyncio.run(main())
