"""What a front does because of the others: two fronts over one ledger and one storage."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from deployments.schemas import CreateStory, to_story_request
from deployments.stories import coordinator, relay
from deployments.stories import ledger as ledger_module
from deployments.stories.admission import Load
from deployments.stories.ledger import Instructions, LocalLedger
from minigpt5.types import StoryRequest
from tests.helpers.served import CONFIG, Served, alive

REQUEST: StoryRequest = to_story_request(CreateStory(prompt="A fox", pages=2, seed=7), CONFIG)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(ledger_module, "LEASE_S", 0.2)
    monkeypatch.setattr(ledger_module, "GRACE_S", 0.0)
    monkeypatch.setattr(relay, "POLL_S", 0.01)
    monkeypatch.setattr(relay, "RETRY_S", 0.02)


async def until_done(served: Served, story_id: str) -> str:
    await served.front.relay.wait(story_id, 10)
    return served.store.load(story_id).status


def test_a_front_cancels_what_was_cancelled_at_another(tmp_path: Path) -> None:
    async def main() -> None:
        shared = LocalLedger()
        one, other = Served(tmp_path, ledger=shared), Served(tmp_path, ledger=shared)
        one.generator.gate.clear()
        async with alive(one, other):
            story = await one.front.runner.start(REQUEST)
            await other.front.coordinator.cancel(story.id)
            assert one.store.load(story.id).status == "cancelled"
            await other.front.coordinator.cancel("story_none")  # that nobody runs

    asyncio.run(main())


def test_a_silent_fronts_story_is_recovered_and_the_silent_front_loses_it(tmp_path: Path) -> None:
    async def main() -> None:
        shared = LocalLedger()
        one, other = Served(tmp_path, ledger=shared), Served(tmp_path, ledger=shared)
        one.generator.gate.clear()
        async with alive(other):
            async with alive(one):
                story = await one.front.runner.start(REQUEST)
                await asyncio.sleep(0.05)
            # `one` sends no more heartbeats.
            assert await until_done(other, story.id) == "done"
            assert one.front.runner.find(story.id) is story
            async with alive(one):
                async with asyncio.timeout(5):
                    assert [event.name async for event in story.follow()] == ["story"]
            assert story.is_lost
        assert other.store.running() == []

    asyncio.run(main())


def test_each_front_knows_the_load_of_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        shared = LocalLedger()
        one, other = Served(tmp_path, ledger=shared), Served(tmp_path, ledger=shared)
        one.generator.gate.clear()
        async with alive(one, other):
            story = await one.front.runner.start(REQUEST)
            await asyncio.sleep(0.1)
            assert other.front.admission.others.num_running == 1
            await one.front.runner.cancel(story.id)
            await asyncio.sleep(0.1)
            assert other.front.admission.others.num_running == 0

    asyncio.run(main())


def test_a_ledger_that_fails_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Restarting(LocalLedger):
        num_asked = 0

        async def heartbeat(self, front: str, held: Mapping[str, int], load: Load) -> Instructions:
            self.num_asked += 1
            if self.num_asked < 4:
                raise ConnectionError("the ledger restarts")
            return await super().heartbeat(front, held, load)

    async def main() -> None:
        before = Served(tmp_path)
        before.generator.gate.clear()
        story = await before.front.runner.start(REQUEST)
        before.front.runner.lose(story.id, story.number)  # it is left in the storage
        again = Served(tmp_path, ledger=Restarting())
        async with alive(again):
            assert await until_done(again, story.id) == "done"

    asyncio.run(main())
    assert caplog.text.count("the ledger does not answer: the ledger restarts") == 3


def test_a_story_whose_front_has_died_is_cancelled_before_it_is_recovered(tmp_path: Path) -> None:
    async def main() -> None:
        first = Served(tmp_path)
        first.generator.gate.clear()
        story = await first.front.runner.start(REQUEST)
        _, task = first.front.runner._running[story.id]
        task.cancel()  # as the process ends
        await asyncio.wait({task})
        second = Served(tmp_path)
        await second.front.coordinator.cancel(story.id)
        assert second.store.load(story.id).status == "cancelled" and second.store.running() == []
        await second.front.coordinator.recover()
        assert second.front.runner.find(story.id) is None

    asyncio.run(main())
