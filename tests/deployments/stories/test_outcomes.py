"""How stories and requests end: the log says it in the words of the metrics."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import NoReturn

import httpx
import pytest

from deployments.api.access_log import RESULTS
from deployments.observability.metrics import HTTP_REQUESTS, STORIES
from minigpt5.errors import StorageError
from minigpt5.story.state import StoryState
from minigpt5.story.store import StoryStore
from tests.helpers.fakes import FakeGenerator
from tests.helpers.served import Served

BODY = {"prompt": "A fox", "pages": 2}


def fail(*arguments: object, **options: object) -> NoReturn:
    raise OSError("no space left on device")


def throw(*arguments: object, **options: object) -> NoReturn:
    raise StorageError("the store does not answer")


def told(caplog: pytest.LogCaptureFixture, field: str) -> list[object]:
    """The values of a field, of the records that have it."""
    return [vars(record)[field] for record in caplog.records if field in vars(record)]


def leave(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Ask for a story that the storage fails: it is left as it is, for a front to resume."""

    async def use(client: httpx.AsyncClient) -> None:
        story = (await client.post("/v1/stories", json={**BODY, "wait": False})).json()
        while not told(caplog, "outcome"):
            await asyncio.sleep(0.01)
        assert (await client.get(f"/v1/stories/{story['id']}")).json()["status"] == "drawing"

    served.run(use)
    assert told(caplog, "outcome") == ["storage_error"]
    assert len(served.store.running()) == 1


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve")


def test_a_story_that_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Served(tmp_path).post(BODY).status_code == 201
    assert told(caplog, "outcome") == ["done"] and told(caplog, "result") == ["answered"]


def test_a_story_that_an_engine_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Served(tmp_path, generator=FakeGenerator(fails_on_page=1)).post(BODY)
    assert told(caplog, "outcome") == ["engine_error"]


def test_a_story_that_cannot_be_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoryStore, "save_picture", throw)
    leave(Served(tmp_path), caplog)


def test_a_story_whose_end_cannot_be_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = StoryStore.save

    def fail_at_the_end(store: StoryStore, state: StoryState) -> None:
        return throw() if state.status == "done" else save(store, state)

    monkeypatch.setattr(StoryStore, "save", fail_at_the_end)
    leave(Served(tmp_path), caplog)


def test_a_story_that_a_client_cancels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(tmp_path)
    served.generator.gate.clear()

    async def use(client: httpx.AsyncClient) -> None:
        story = (await client.post("/v1/stories", json={**BODY, "wait": False})).json()
        assert (await client.post(f"/v1/stories/{story['id']}/cancel")).json()["status"] == "cancelled"

    served.run(use)
    assert told(caplog, "outcome") == ["cancelled"]


def test_a_request_that_the_storage_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(tmp_path)
    monkeypatch.setattr(served.store, "list_ids", fail)
    assert served.request("GET", "/v1/stories").status_code == 500
    monkeypatch.setattr(served.store, "list_ids", throw)
    assert served.request("GET", "/v1/stories").status_code == 503
    assert told(caplog, "result") == ["storage_error", "storage_error"]


def test_requests_that_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(tmp_path)
    for method, path in (("GET", "/v1/stories/story_none"), ("PUT", "/v1/stories"), ("GET", "/v1/stories?limit=x")):
        served.request(method, path)
    assert told(caplog, "result") == ["not_found", "invalid", "invalid"]


def test_a_request_whose_client_leaves_before_its_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/stories", json={**BODY, "pages": 8}))
        while "story begins" not in caplog.text:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})

    Served(tmp_path, generator=FakeGenerator(delay_s=0.05)).run(use)
    assert told(caplog, "result") == ["abandoned"] and told(caplog, "status") == [0]


def test_every_end_has_a_place_in_the_table() -> None:
    assert {*RESULTS.values(), "abandoned"} < set(HTTP_REQUESTS.labels["result"])
    assert {"done", "cancelled", "engine_error", "storage_error", "blocked"} < set(STORIES.labels["outcome"])
