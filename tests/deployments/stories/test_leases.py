"""Leases of two fronts over one ledger and one storage."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import pytest

from deployments.stories import leases as module
from deployments.stories import ledger as ledger_module
from deployments.stories.leases import Lease, Leases, StoryBusy
from deployments.stories.ledger import LocalLedger
from minigpt5.errors import StoryTaken
from minigpt5.story.state import PageState, StoryState
from minigpt5.story.store import StoryStore


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(ledger_module, "GRACE_S", 0.0)


def two(tmp_path: Path) -> tuple[StoryStore, Leases, Leases]:
    store, ledger = StoryStore(str(tmp_path)), LocalLedger()
    return store, Leases(ledger, store), Leases(ledger, store)


def test_a_name_has_one_holder_at_all_fronts(tmp_path: Path) -> None:
    async def main() -> None:
        _, one, other = two(tmp_path)
        async with one.hold("story_1") as first:
            assert one.held == {"story_1": first.number} and other.held == {}
            for front in (one, other):
                with pytest.raises(StoryBusy, match="story_1 is being worked on"):
                    async with front.hold("story_1"):
                        pass
            async with other.hold("story_2"):
                pass
        async with other.hold("story_1") as second:
            assert second.number > first.number
        assert one.held == other.held == {}

    asyncio.run(main())


def test_a_lease_that_is_kept_outlives_its_context_until_it_is_released(tmp_path: Path) -> None:
    async def main() -> None:
        _, one, other = two(tmp_path)
        async with one.hold("story_1") as lease:
            lease.is_kept = True
        assert one.held == {"story_1": lease.number}
        with pytest.raises(StoryBusy):
            async with other.hold("story_1"):
                pass
        await one.release(lease)
        async with other.hold("story_1"):
            pass

    asyncio.run(main())


def test_an_abandoned_lease_is_free_when_it_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LEASE_S", 0.05)

    async def main() -> None:
        _, one, other = two(tmp_path)
        async with one.hold("story_1") as lease:
            lease.is_kept = True
        one.abandon(lease)
        assert one.held == {}
        with pytest.raises(StoryBusy):
            async with other.hold("story_1"):
                pass
        async with asyncio.timeout(5), other.wait_for("story_1"):
            pass

    asyncio.run(main())


def test_a_late_release_does_not_end_the_next_holders_lease(tmp_path: Path) -> None:
    async def main() -> None:
        store, one, other = two(tmp_path)
        async with one.hold("story_1") as old:
            pass
        async with one.hold("story_1"):
            await one.release(old)
            one.abandon(old)
            assert list(one.held) == ["story_1"]
            with pytest.raises(StoryBusy):
                async with other.hold("story_1"):
                    pass
        unknown = Lease(name="story_2", number=1, store=store)
        await one.release(unknown)

    asyncio.run(main())


def test_the_ones_who_wait_come_one_after_another(tmp_path: Path) -> None:
    async def main() -> None:
        _, *fronts = two(tmp_path)
        inside = most = 0

        async def work(front: Leases) -> None:
            nonlocal inside, most
            async with front.wait_for("once-1"):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.02)
                inside -= 1

        await asyncio.gather(*(work(front) for front in fronts for _ in range(3)))
        assert most == 1

    asyncio.run(main())


def test_a_change_is_marked_as_long_as_it_takes(tmp_path: Path) -> None:
    """A process that dies within it leaves the mark, which another one finds."""

    async def main() -> None:
        store, one, _ = two(tmp_path)
        async with one.exclusive("story_1"):
            assert store.running() == ["story_1"]
        assert store.running() == []
        async with one.exclusive("story_1") as lease:
            lease.is_kept = True  # a story was started: its runner removes the mark
        assert store.running() == ["story_1"]

    asyncio.run(main())


def test_who_lost_a_lease_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LEASE_S", 0.05)

    async def main() -> None:
        store, one, other = two(tmp_path)
        async with one.exclusive("story_1") as old:
            await asyncio.sleep(0.1)
            async with other.exclusive("story_1") as new:
                new.store.save_page("story_1", PageState(index=1, text="New."))
                with pytest.raises(StoryTaken):
                    old.store.save_page("story_1", PageState(index=1, text="Old."))
            assert store.load_page("story_1", 1).text == "New."

    asyncio.run(main())


def test_a_ledger_that_does_not_answer_keeps_nobody_from_going(tmp_path: Path) -> None:
    class Failing(LocalLedger):
        async def release(self, name: str, number: int) -> None:
            raise ConnectionError("the ledger is gone")

    async def main() -> None:
        leases = Leases(Failing(), StoryStore(str(tmp_path)))
        async with leases.hold("story_1"):
            pass
        assert leases.held == {}

    asyncio.run(main())


def test_a_story_that_is_still_to_be_made_keeps_its_mark(tmp_path: Path) -> None:
    """By which a front that recovers it finds it, whatever somebody wanted to change meanwhile."""

    async def main() -> None:
        store, one, _ = two(tmp_path)
        state = StoryState(id="story_1", created=1, model="m", prompt="A fox", seed=7, num_pages=1, status="drawing")
        store.mark("story_1", is_running=True)
        store.save(state)
        for failure in (None, ValueError("refused")):
            with contextlib.suppress(ValueError):
                async with one.exclusive("story_1"):
                    if failure:
                        raise failure
            assert store.running() == ["story_1"]
        async with one.exclusive("story_1") as lease:
            lease.store.save(dataclasses.replace(state, status="done"))
        assert store.running() == []
        async with one.exclusive("story_none"):
            pass
        assert store.running() == []

    asyncio.run(main())
