"""What every stream of the API has in common, over a real socket: statuses, comments, failures, lost readers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.api import replies
from deployments.api.errors import ApiError, install_error_handlers
from deployments.api.replies import EventStream
from deployments.stories.events import Position
from minigpt5.types import GeneratorEvent, StoryRequest, TextDelta
from tests.deployments.test_sse import OTHER_LINE_ENDS
from tests.helpers.fakes import FakeGenerator
from tests.helpers.processes import find_free_port
from tests.helpers.served import Listening, Served, assert_error, read_events

CHAT, STORIES, PAGES = "/v1/chat/completions", "/v1/stories", "/v1/stories/{id}/pages"
STREAMS: dict[str, dict[str, Any]] = {
    STORIES: {"prompt": "A fox", "pages": 1, "seed": 7, "stream": True},
    CHAT: {"messages": [{"role": "user", "content": "A fox"}], "seed": 7, "stream": True},
}
COMMENT = ": keep-alive"


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.02)


@pytest.fixture
def listen() -> Iterator[Callable[[Served], httpx.Client]]:
    """A client of a front on a socket."""
    opened: list[tuple[Listening, httpx.Client]] = []

    def start(served: Served) -> httpx.Client:
        port = find_free_port()
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20)
        opened.append((Listening(served, port), client))
        return client

    yield start
    for listening, client in opened:
        client.close()
        listening.stop()


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Line ends in texts


class Writing(FakeGenerator):
    """Writes a given text, and nothing else."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        yield TextDelta(page=1, text=self.text)
        yield self._vokens(1)


@pytest.mark.parametrize("character", OTHER_LINE_ENDS, ids=ascii)
def test_lines_of_a_stream_are_the_same_to_every_reader(tmp_path: Path, character: str) -> None:
    """httpx splits at this character, and finds whole JSON all the same."""
    text = f"A fox{character}ran."
    served = Served(tmp_path, generator=Writing(text))
    story = served.post({**STREAMS[STORIES], "prompt": text})
    reply = served.post(STREAMS[CHAT], CHAT)
    for stream in (story, reply):
        data = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
        assert all(json.loads(line) for line in data if line != "[DONE]")
    assert read_events(story.text)[-1][2]["prompt"] == text
    assert read_events(story.text)[-1][2]["pages"][0]["text"] == text
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


# After the end


def ids_of(served: Served, path: str) -> list[str]:
    return [position for position, _, _ in read_events(served.request("GET", path).text)]


def resume(served: Served, path: str, position: str) -> httpx.Response:
    return served.request("GET", path, headers={"Last-Event-ID": position})


@pytest.mark.parametrize("fails_on_page", [None, 2], ids=["done", "error"])
def test_a_reader_who_has_the_end_is_told_that_nothing_comes(tmp_path: Path, fails_on_page: int | None) -> None:
    served = Served(tmp_path, generator=FakeGenerator(fails_on_page=fails_on_page))
    live = read_events(served.post({"prompt": "A fox", "pages": 3, "stream": True}).text)
    [story] = served.request("GET", STORIES).json()["data"]
    path = f"/v1/stories/{story['id']}/events"
    last = ids_of(served, path)[-1]
    later = "9-" + Position.parse(last).kind + "-0.10-0-0.1ff"
    for position in (live[-1][0], last, later):
        reply = resume(served, path, position)
        assert (reply.status_code, reply.content, reply.headers["cache-control"]) == (204, b"", "no-cache")
    reply = resume(served, path, live[-2][0])
    assert reply.status_code == 200
    assert [name for _, name, _ in read_events(reply.text)] == [live[-1][1]]


def test_a_reader_of_a_cancelled_story_is_told_that_nothing_comes(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.02))

    async def use(client: httpx.AsyncClient) -> None:
        reading = asyncio.create_task(client.post(STORIES, json={"prompt": "A fox", "pages": 4, "stream": True}))
        while not (stored := list((tmp_path / "stories").glob("story_*/pages/2"))):
            await asyncio.sleep(0.01)
        path = f"/v1/stories/{stored[0].parts[-3]}"
        await client.post(f"{path}/cancel")
        live = read_events((await reading).text)
        assert live[-1][2]["status"] == "cancelled"
        reply = await client.get(f"{path}/events", headers={"Last-Event-ID": live[-1][0]})
        if reply.status_code == 200:  # something was stored that the cancel kept from being told: it is told once
            told = read_events(reply.text)
            reply = await client.get(f"{path}/events", headers={"Last-Event-ID": told[-1][0]})
        assert reply.status_code == 204

    served.run(use)


def test_a_reader_hears_of_pages_that_were_added_after_the_end(served: Served) -> None:
    story = served.post({"prompt": "A fox", "pages": 1, "seed": 7}).json()
    path = f"/v1/stories/{story['id']}/events"
    last = ids_of(served, path)[-1]
    assert resume(served, path, last).status_code == 204
    served.post({"count": 1}, PAGES.format(id=story["id"]))
    reply = resume(served, path, last)
    assert reply.status_code == 200
    assert {(name, data.get("page", data.get("index"))) for _, name, data in read_events(reply.text)} >= {
        ("text", 2),
        ("page", 2),
        ("done", None),
    }


# Comments


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_is_never_quiet(
    tmp_path: Path, impatient: None, listen: Callable[[Served], httpx.Client], path: str
) -> None:
    client = listen(Served(tmp_path, generator=FakeGenerator(delay_s=0.15)))
    with client.stream("POST", path, json=STREAMS[path]) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines.count(COMMENT) >= 4
    assert all(line.partition(": ")[0] in ("", "id", "event", "data") for line in lines)


@pytest.mark.parametrize("path", STREAMS)
def test_a_refusal_that_takes_long_is_the_last_event(
    served: Served, impatient: None, listen: Callable[[Served], httpx.Client], path: str
) -> None:
    has_headers = threading.Event()

    async def refuse(request: StoryRequest) -> None:
        while not has_headers.is_set():
            await asyncio.sleep(0.01)
        raise ApiError(400, "prompt is too long", param="prompt", code="invalid_value")

    served.front.engines.validate_request = refuse  # type: ignore[method-assign]
    with listen(served).stream("POST", path, json=STREAMS[path]) as response:
        assert response.status_code == 200
        has_headers.set()
        lines = [line for line in response.iter_lines() if line]
    error = {
        "message": "prompt is too long",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "invalid_value",
    }
    assert lines[0] == COMMENT
    assert json.loads(lines[-1].removeprefix("data: ")) == {"error": error}
    assert (lines[-2] == "event: error") == (path == STORIES)
    assert served.front.admission.num_running == 0


@pytest.mark.parametrize("path", STREAMS)
def test_a_refusal_that_is_known_at_once_is_a_status(tmp_path: Path, path: str) -> None:
    served = Served(tmp_path, generator=FakeGenerator(max_words=1))
    status = {STORIES: 422, CHAT: 400}[path]
    assert_error(served.post(STREAMS[path], path), status, param="prompt", says=("the window is 1",))
    served.front.admission.max_running = 0
    reply = served.post(STREAMS[path], path)
    assert_error(reply, 503, says=("limit is 0",))
    assert int(reply.headers["Retry-After"]) >= 1


def test_pages_of_a_story_that_is_not_there_cannot_be_streamed(served: Served) -> None:
    assert_error(served.post({"count": 1, "stream": True}, PAGES.format(id="story_1")), 404)


# Failures and lost readers


@pytest.mark.parametrize("path", STREAMS)
def test_a_lost_reader_ends_a_reply_and_not_a_story(
    tmp_path: Path, listen: Callable[[Served], httpx.Client], path: str
) -> None:
    generator = FakeGenerator(delay_s=0.1)
    served = Served(tmp_path, generator=generator)
    with listen(served).stream("POST", path, json=STREAMS[path]) as response:
        next(response.iter_bytes())
    eventually(lambda: generator.num_closed == 1 and served.front.admission.num_running == 0)
    ended = [story["status"] for story in served.request("GET", STORIES).json()["data"]]
    assert ended == (["done"] if path == STORIES else [])


def test_a_stream_whose_story_cannot_be_read_ends_without_an_end(
    served: Served, listen: Callable[[Served], httpx.Client]
) -> None:
    story = served.post({"prompt": "A fox", "pages": 1}).json()

    async def fail(story_id: str, seen: object) -> AsyncGenerator[Any]:
        raise OSError("the storage is away")
        yield

    served.front.relay.follow = fail  # type: ignore[method-assign]
    reply = served.request("GET", f"/v1/stories/{story['id']}/events")
    assert (reply.status_code, reply.content) == (200, b"")


def serve(events: Callable[[], AsyncGenerator[str]]) -> httpx.Response:
    """A reply with these events, of an application with our error handlers."""
    api = FastAPI()
    install_error_handlers(api)

    @api.get("/")
    async def get() -> Any:
        return EventStream(events(), error_name="error")

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    return asyncio.run(main())


def test_events_are_read_by_one_task() -> None:
    """A task group of the events' source would break where its steps ran in several."""
    tasks: set[object] = set()

    async def events() -> AsyncGenerator[str]:
        try:
            for number in range(3):
                tasks.add(asyncio.current_task())
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(0))
                    yield f"data: {number}\n\n"
        finally:
            tasks.add(asyncio.current_task())

    reply = serve(events)
    assert reply.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert len(tasks) == 1


def test_an_unexpected_failure_tells_a_stream_no_details() -> None:
    async def events() -> AsyncGenerator[str]:
        yield "data: 1\n\n"
        raise RuntimeError("secret")

    reply = serve(events)
    assert reply.status_code == 200
    assert reply.text.startswith("data: 1\n\nevent: error\ndata: ")
    assert "internal error" in reply.text and "secret" not in reply.text


@pytest.mark.timeout(20)
def test_a_source_that_was_cancelled_ends_its_stream(impatient: None) -> None:
    """An engine may be cancelled by others: its stream would otherwise be comments without end."""

    async def events() -> AsyncGenerator[str]:
        yield "data: 1\n\n"
        raise asyncio.CancelledError

    [first, last] = read_events(serve(events).text)
    assert (first[2], last[1], last[2]["error"]["code"]) == (1, "error", "engine_lost")


def test_a_slow_reader_slows_its_source_down() -> None:
    num_made, num_sent = 0, 0
    ahead: list[int] = []

    async def events() -> AsyncGenerator[str]:
        nonlocal num_made
        for number in range(20):
            num_made += 1
            yield f"data: {number}\n\n"

    async def send(message: Any) -> None:
        nonlocal num_sent
        await asyncio.sleep(0.002)
        num_sent += message["type"] == "http.response.body"
        ahead.append(num_made - num_sent)

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(events())(scope, receive, send))
    assert num_made == 20 and max(ahead) <= 2
