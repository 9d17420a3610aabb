"""Stories stay unless an operator says otherwise, and then the oldest go first."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path

import httpx
import pytest

from deployments.schemas import CreateStory, to_story_request
from deployments.stories.retention import ONCE_S, keep_within, remove_old
from minigpt5.errors import EngineLost, StorageError, StoryTaken
from minigpt5.story.state import StoryBuilder
from tests.helpers.served import CONFIG, Served, assert_error

BODY = {"prompt": "A fox", "pages": 1, "seed": 7}


def remove(served: Served, *, max_age_s: float | None = None, max_bytes: float | None = None) -> list[str]:
    return asyncio.run(remove_old(served.store, served.front.leases, max_age_s=max_age_s, max_bytes=max_bytes))


def test_old_stories_go_and_young_ones_stay(tmp_path: Path) -> None:
    served = Served(tmp_path)
    old, young = (served.post(BODY).json()["id"] for _ in range(2))
    state = served.store.load(old)
    served.store.save(dataclasses.replace(state, created=state.created - 1000))
    assert remove(served, max_age_s=2000) == []
    assert remove(served, max_age_s=500) == [old]
    assert served.store.list_ids() == [young]


def test_the_oldest_go_until_the_rest_fits(tmp_path: Path) -> None:
    served = Served(tmp_path)
    ids = [served.post(BODY).json()["id"] for _ in range(4)]
    sizes = served.store.sizes()
    assert set(sizes) == set(ids) and all(size > 500 for size in sizes.values())
    assert remove(served, max_bytes=sum(sizes.values())) == []
    assert remove(served, max_bytes=sizes[ids[2]] + sizes[ids[3]]) == ids[:2]
    assert served.store.list_ids() == ids[:1:-1]


def test_what_is_being_made_stays(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        served.generator.gate.clear()
        path = (await client.post("/v1/stories", json={**BODY, "wait": False})).headers["location"]
        assert await remove_old(served.store, served.front.leases, max_age_s=-1, max_bytes=0) == []
        served.generator.gate.set()
        assert (await client.get(f"{path}?wait=10")).json()["status"] == "done"

    served.run(use)
    assert len(remove(served, max_bytes=0)) == 1


def test_a_store_that_fails_once_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def delete_images(*, older_than_s: float) -> None:
        calls.append(older_than_s)
        if len(calls) == 1:
            raise StorageError("the store does not answer")
        raise asyncio.CancelledError

    served = Served(tmp_path)
    monkeypatch.setattr(served.store, "delete_images", delete_images)
    monkeypatch.setattr("deployments.stories.retention.LOOK_S", 0.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keep_within(served.store, served.front.leases, max_age_s=None, max_bytes=None))
    assert len(calls) == 2


def test_keys_of_requests_are_forgotten_after_a_day_and_owners_indexed(tmp_path: Path) -> None:
    served = Served(tmp_path)
    headers = {"Idempotency-Key": "fox-1"}
    first, again = (served.request("POST", "/v1/stories", json=BODY, headers=headers).json()["id"] for _ in range(2))
    assert first == again
    [marker] = (tmp_path / "once").iterdir()

    async def look_once() -> None:
        task = asyncio.create_task(keep_within(served.store, served.front.leases, max_age_s=None, max_bytes=None))
        await asyncio.sleep(0.5)
        task.cancel()

    asyncio.run(look_once())
    assert marker.exists() and served.store.list_ids(owner="somebody else") == []
    old = time.time() - ONCE_S - 60
    os.utime(marker, (old, old))
    asyncio.run(look_once())
    assert not marker.exists()
    assert served.request("POST", "/v1/stories", json=BODY, headers=headers).json()["id"] != first


def test_stories_of_a_front_that_died_are_recovered_beside_it(tmp_path: Path) -> None:
    """It holds their leases for a moment, at worst, and leaves their marks."""
    request = to_story_request(CreateStory(prompt="A fox", pages=2, seed=7), CONFIG)
    store = Served(tmp_path).store
    for number in range(4):
        state = StoryBuilder(request, story_id=f"story_{number}", model="m").state()
        store.mark(state.id, is_running=True)
        store.save_request(state.id, request)
        store.save(state)

    async def main() -> None:
        served = Served(tmp_path)
        looks = remove_old(served.store, served.front.leases, max_age_s=-1, max_bytes=0)
        removed, _ = await asyncio.gather(looks, served.front.coordinator.recover())
        assert removed == []
        await served.front.coordinator.recover()
        for story_id in store.list_ids():
            await served.front.relay.wait(story_id, 10)

    asyncio.run(main())
    assert [store.load(one).status for one in store.list_ids()] == ["done"] * 4 and store.running() == []


@pytest.mark.parametrize(
    "failure", [EngineLost("the ledger is away"), StoryTaken("another front has it"), ValueError()]
)
def test_nothing_ends_the_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    served, calls = Served(tmp_path), list[str]()
    served.post(BODY)

    async def claim(front: str, name: str, *, is_new: bool = False) -> int | None:
        calls.append(name)
        if len(calls) == 3:
            raise asyncio.CancelledError
        raise failure

    monkeypatch.setattr(served.front.leases._ledger, "claim", claim)
    monkeypatch.setattr("deployments.stories.retention.LOOK_S", 0.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keep_within(served.store, served.front.leases, max_age_s=-1, max_bytes=None))
    assert len(calls) == 3


def test_a_story_that_somebody_has_damaged_hides_no_other(tmp_path: Path) -> None:
    served = Served(tmp_path)
    good, bad = (served.post(BODY).json()["id"] for _ in range(2))
    (tmp_path / "stories" / bad / "story.json").write_text("")
    served.store.index_owners()
    assert [one["id"] for one in served.request("GET", "/v1/stories").json()["data"]] == [good]
    assert_error(served.request("GET", f"/v1/stories/{bad}"), 404, says=("is damaged",))
    assert remove(served, max_bytes=0) == [good]
