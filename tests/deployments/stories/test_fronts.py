"""Two fronts over one storage: whatever is asked of either is as if there were one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api.routes import create_api
from deployments.stories import coordinator, leases, ledger, relay
from deployments.stories.ledger import LocalLedger
from minigpt5.errors import StoryTaken
from minigpt5.story.state import PageState
from minigpt5.story.store import StoryStore
from tests.deployments.stories.test_resume import told
from tests.deployments.test_auth import Guarded
from tests.helpers.fakes import FakeGenerator
from tests.helpers.served import Served, alive, assert_error, read_events

BODY = {"prompt": "A fox", "pages": 3, "seed": 7}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(ledger, "LEASE_S", 0.3)
    monkeypatch.setattr(ledger, "GRACE_S", 0.1)
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    monkeypatch.setattr(relay, "POLL_S", 0.01)
    monkeypatch.setattr(relay, "RETRY_S", 0.02)
    monkeypatch.setattr(coordinator, "RECOVER_S", 0.05)


@contextlib.asynccontextmanager
async def clients_of(*fronts: Served) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Clients of fronts that beat."""
    async with alive(*fronts), contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(transport=httpx.ASGITransport(create_api(served.front)), base_url="http://test")
            )
            for served in fronts
        ]
        yield clients


def two(tmp_path: Path, **options: Any) -> tuple[Served, Served]:
    shared = LocalLedger()
    return tuple(  # type: ignore[return-value]
        Served(tmp_path, generator=FakeGenerator(delay_s=0.02), ledger=shared, **options) for _ in range(2)
    )


def test_a_stream_is_the_same_at_the_other_front(tmp_path: Path) -> None:
    """Live: text by its deltas, and the progress of pictures."""
    one, other = two(tmp_path)

    async def use() -> None:
        async with clients_of(one, other) as (here, there):
            story = (await here.post("/v1/stories", json={**BODY, "wait": False})).json()
            path = f"/v1/stories/{story['id']}/events"
            streams = await asyncio.gather(here.get(path), there.get(path))
            near, far = (read_events(stream.text) for stream in streams)
            # Steps of a picture that is finished meanwhile need not be told any more.
            assert [event for event in far if event[1] != "progress"] == [e for e in near if e[1] != "progress"]
            assert {"text", "progress", "image", "page", "done"} <= {name for _, name, _ in far}
            assert {str(event) for event in far} <= {str(event) for event in near}
            assert one.generator.requests and not other.generator.requests
            # A reader who was cut off in the middle continues at the other front.
            story = (await here.post("/v1/stories", json={**BODY, "wait": False})).json()
            path = f"/v1/stories/{story['id']}/events"
            begun: list[str] = []
            async with here.stream("GET", path) as response:
                async for line in response.aiter_lines():
                    begun.append(line)
                    if len(begun) > 20 and not line:
                        break
            before = read_events("\n".join([*begun, ""]))
            rest = read_events((await there.get(path, headers={"Last-Event-ID": before[-1][0]})).text)
            whole = read_events((await there.get(path)).text)
            assert told([*before, *rest]) == told(whole)

    asyncio.run(use())


def test_any_front_cancels_waits_and_refuses_a_change(tmp_path: Path) -> None:
    one, other = two(tmp_path)

    async def use() -> None:
        async with clients_of(one, other) as (here, there):
            one.generator.gate.clear()
            story = (await here.post("/v1/stories", json={**BODY, "wait": False})).json()
            path = f"/v1/stories/{story['id']}"
            assert_error(await there.patch(f"{path}/pages/1", json={"text": "No."}), 409)
            assert_error(await there.post(f"{path}/pages", json={"count": 1}), 409)
            assert (await there.post(f"{path}/cancel")).json()["status"] == "cancelled"
            assert (await here.get(path)).json()["status"] == "cancelled"
            assert one.generator.num_closed == 1
            one.generator.gate.set()
            done = (await here.post("/v1/stories", json=BODY)).json()
            redrawn = await there.post(f"/v1/stories/{done['id']}/pages/1/redraw", json={"seed": 5})
            assert redrawn.status_code == 201
            assert (await there.delete(f"/v1/stories/{done['id']}")).status_code == 204
            assert_error(await here.get(f"/v1/stories/{done['id']}"), 404)
            assert one.store.running() == []

    asyncio.run(use())


def test_the_same_idempotency_key_at_both_is_one_story(tmp_path: Path) -> None:
    one, other = two(tmp_path)

    async def use() -> None:
        async with clients_of(one, other) as (here, there):
            headers = {"Idempotency-Key": "k"}
            bodies = (BODY, BODY, {**BODY, "feedback": "text"}, BODY)  # one says a default
            posts = [
                client.post("/v1/stories", json=body, headers=headers)
                for client, body in zip((here, there, here, there), bodies, strict=True)
            ]
            replies = await asyncio.gather(*posts)
            assert [reply.status_code for reply in replies] == [201] * 4
            assert len({reply.json()["id"] for reply in replies}) == 1
            assert len(one.generator.requests) + len(other.generator.requests) == 1

    asyncio.run(use())


def test_limits_of_a_key_and_of_the_server_are_those_of_all_fronts(tmp_path: Path) -> None:
    shared = LocalLedger()
    one = Guarded(tmp_path, concurrent=1, ledger=shared)
    other = Served(tmp_path, keys=one.keys, ledger=shared)

    async def use() -> None:
        async with clients_of(one, other) as (here, there):
            one.generator.gate.clear()
            first = asyncio.create_task(here.post("/v1/stories", json=BODY, headers=one.alice))
            while not one.generator.requests:
                await asyncio.sleep(0.01)
            assert_error(await there.post("/v1/stories", json=BODY, headers=one.alice), 429, says=("1 at once",))
            other.front.admission.max_running = 1
            await asyncio.sleep(0.1)  # a beat
            assert_error(await there.post("/v1/stories", json=BODY, headers=one.bob), 503)
            one.generator.gate.set()
            assert (await first).status_code == 201

    asyncio.run(use())


def test_the_stories_of_a_front_that_died_are_gone_on_with_by_the_other(tmp_path: Path) -> None:
    """And readers of the other front hear it to its end, without a word twice."""
    one, other = two(tmp_path)

    async def never(*arguments: object) -> None:
        """What a dead process stores."""

    async def use() -> None:
        async with clients_of(other) as [there]:
            async with clients_of(one) as [here]:
                story = (await here.post("/v1/stories", json={**BODY, "wait": False})).json()
                reading = asyncio.create_task(there.get(f"/v1/stories/{story['id']}/events"))
                await asyncio.sleep(0.15)
                one.front.runner._end = never  # type: ignore[method-assign]
                one.front.runner._running[story["id"]][1].cancel()
            events = read_events((await reading).text)
            assert events[-1][1] == "done"
            assert [page["text"] for page in events[-1][2]["pages"]] == [f"Page {n} of 7." for n in (1, 2, 3)]
            assert [told(events)[n]["text"] for n in (1, 2, 3)] == [f"Page {n} of 7." for n in (1, 2, 3)]
            texts = "".join(data["delta"] for _, name, data in events if name == "text")
            assert texts == "Page 1 of 7.Page 2 of 7.Page 3 of 7."
            assert other.store.running() == []

    asyncio.run(use())


def test_what_was_cut_off_is_gone_on_with_though_both_fronts_start_at_once(tmp_path: Path) -> None:
    """Each knows of the other before its first look, when it is too soon to take anything up."""
    before = Served(tmp_path, generator=FakeGenerator(delay_s=0.02))

    async def begin(client: httpx.AsyncClient) -> None:
        await client.post("/v1/stories", json={**BODY, "wait": False})
        await asyncio.sleep(0.1)

    before.run(begin)
    [story_id] = before.store.running()
    one, other = two(tmp_path)

    async def use() -> None:
        shared = one.front.coordinator._ledger
        for front in (one, other):
            await shared.heartbeat(front.front.leases.front, {}, front.front.admission.load)
        async with clients_of(one, other) as (here, _):
            assert (await here.get(f"/v1/stories/{story_id}?wait=10")).json()["status"] == "done"
        assert len(one.generator.requests) + len(other.generator.requests) == 1

    asyncio.run(use())


def test_a_front_that_was_thought_dead_stores_nothing_more(tmp_path: Path) -> None:
    """It stalls for longer than its lease, another one takes the story, and then it wakes up."""
    one, other = two(tmp_path)

    async def use() -> None:
        async with clients_of(one) as [here]:
            one.generator.gate.clear()
            story = (await here.post("/v1/stories", json={**BODY, "wait": False})).json()
            path = f"/v1/stories/{story['id']}"
            reading = asyncio.create_task(here.get(f"{path}/events"))
            await asyncio.sleep(0.05)
        async with clients_of(other) as [there]:  # the first beats no more
            assert (await there.get(f"{path}?wait=10")).json()["status"] == "done"
            before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
            one.generator.gate.set()
            assert read_events((await reading).text)[-1][1] == "done"
            assert one.front.runner.find(story["id"]) is None
            assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    asyncio.run(use())


def test_what_is_stored_under_a_lost_lease_is_refused(tmp_path: Path) -> None:
    store = StoryStore(str(tmp_path))
    old, new = store.owned(1), store.owned(2)
    old.mark("story_1", is_running=True)
    old.save_page("story_1", PageState(index=1, text="Old."))
    new.mark("story_1", is_running=True)
    page = PageState(index=1, text="New.")
    new.save_page("story_1", page)
    for write in (
        lambda: old.save_page("story_1", dataclasses.replace(page, text="Late.")),
        lambda: old.mark("story_1", is_running=True),
        lambda: old.mark("story_1", is_running=False),
        lambda: old.delete("story_1"),
        lambda: old.forget_drawing("story_1", 1),
    ):
        with pytest.raises(StoryTaken):
            write()
    assert store.load_page("story_1", 1) == page
    new.mark("story_1", is_running=False)
    with pytest.raises(StoryTaken):
        new.save_page("story_1", page)
