"""Nothing of a story is lost: streams go on after any event, stories go on after any death."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import random
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pyarrow import fs

from deployments import sse
from deployments.schemas import CreateStory, to_story_request
from deployments.stories import coordinator
from deployments.stories import resume as replay
from deployments.stories.events import Numbering, Position, StreamEvent, after, stored_events
from minigpt5.errors import EngineLost
from minigpt5.story import store as stored
from minigpt5.story.state import PageState, StoryState
from minigpt5.types import DecoderEvent, DrawRequest, GeneratorEvent, StoryRequest, TextDelta, Vokens
from tests.helpers.fakes import FakeDecoder, FakeGenerator
from tests.helpers.processes import find_free_port
from tests.helpers.served import CONFIG, Listening, Served, assert_error, let_writers_end, read_events

BODY = {"prompt": "A fox", "pages": 3, "seed": 7}
MAX_STEPS = 3


def told(events: list[tuple[str, str, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """What a client knows of each page that follows the events of a stream."""
    pages: dict[int, dict[str, Any]] = {}
    for _, name, data in events:
        page = pages.setdefault(data.get("page", data.get("index", 0)), {"text": ""})
        if name == "text":
            page["text"] += data["delta"]
        elif name == "restart":
            page["text"] = ""
        elif name in ("slot", "image"):
            page[name] = True
        elif name == "page":
            page["whole"] = data
    return pages


class LosingGenerator(FakeGenerator):
    """Dies after so many events, as often as `losses` says."""

    def __init__(self, losses: list[int], **options: Any) -> None:
        super().__init__(**options)
        self.losses = losses

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        left = self.losses.pop(0) if self.losses else None
        async for event in super().generate(request):
            if left == 0:
                raise EngineLost("an engine's process died")
            left = left if left is None else left - 1
            yield event


class ChangingGenerator(FakeGenerator):
    """Writes something else each time, as after a close choice."""

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        number = len(self.requests)
        async for event in super().generate(request):
            if isinstance(event, TextDelta) and event.page > len(request.given):
                event = dataclasses.replace(event, text=event.text.replace("Page", f"Try {number}, page"))
            yield event
            if number == 0 and isinstance(event, TextDelta) and event.page == 2:
                raise EngineLost("an engine's process died")


class LosingDecoder(FakeDecoder):
    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        if request.vokens.page == 2 and len(self.requests) < 6:
            self.requests.append(request)
            raise EngineLost("an engine's process died")
        async for event in super().decode(request):
            yield event


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LOSS_PAUSE_S", 0.0)


# Streams


@pytest.mark.parametrize("is_running", [True, False])
def test_a_stream_goes_on_after_any_event_and_misses_nothing(tmp_path: Path, is_running: bool) -> None:
    """From the events of a running story, and from what is stored of one that has ended."""
    served = Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        served.generator.gate.clear()
        story = await served.front.runner.start(to_story_request(CreateStory(**BODY), CONFIG))
        path = f"/v1/stories/{story.id}/events"
        served.generator.gate.set()
        whole = read_events((await client.get(path)).text)
        if is_running:
            served.front.runner._running[story.id] = (
                story,
                asyncio.create_task(asyncio.sleep(0)),
            )  # its events are still here
        assert whole[-1][1] == "done"
        for number, (position, _, _) in enumerate(whole[:-1]):
            rest = read_events((await client.get(path, headers={"Last-Event-ID": position})).text)
            both = [*whole[: number + 1], *rest]
            assert told(both) == told(whole), position
            assert rest[-1][1] == "done"
            texts = "".join(data["delta"] for _, name, data in both if name == "text")
            assert texts == "".join(data["delta"] for _, name, data in whole if name == "text"), position
            assert "restart" not in {name for _, name, _ in rest}

    served.run(use)


def test_a_text_that_is_another_one_now_begins_anew() -> None:
    state = StoryState(id="story_1", created=0, model="m", prompt="p", seed=1, num_pages=2)
    old = dataclasses.replace(state, pages=(PageState(index=1, text="The fox walks."),))
    new = dataclasses.replace(
        state, status="cancelled", pages=(PageState(index=1, text="The fox runs."), PageState(index=2, text="Far."))
    )

    async def go_on(seen: Position) -> list[StreamEvent]:
        async def events() -> AsyncGenerator[StreamEvent, None]:
            for event in stored_events(new):
                yield event

        return [event async for event in after(events(), seen)]

    seen = stored_events(old)[-1].position
    assert seen.num_characters == len("The fox walks.")
    events = asyncio.run(go_on(seen))
    assert [event.name for event in events][:3] == ["restart", "text", "slot"]
    assert events[1].data["delta"] == "The fox runs."
    # Half of a word that both have in common is continued.
    numbering = Numbering("story_1")
    half = numbering.text(1, "The fox")
    assert half
    events = asyncio.run(go_on(half.position))
    assert (events[0].name, events[0].data["delta"]) == ("text", " runs.")


def test_a_reader_who_is_cut_off_again_and_again_hears_everything_once(tmp_path: Path) -> None:
    """At each connection a story is stored as far as it was then, its pictures later than the text after them."""
    served = Served(tmp_path)
    whole = read_events(served.post({**BODY, "stream": True}).text)
    final = served.store.load(whole[0][2]["id"])
    one, two, three = final.pages
    plain = [dataclasses.replace(page, image=None) for page in final.pages]
    stored = [(plain[0],), (plain[0], plain[1]), (one, plain[1]), (one, two, plain[2]), (one, two, three)]

    async def connect(pages: tuple[PageState, ...], seen: Position | None) -> list[StreamEvent]:
        async def events() -> AsyncGenerator[StreamEvent, None]:
            state = dataclasses.replace(final, pages=pages, status="done" if pages == final.pages else "drawing")
            for event in stored_events(state):
                yield event

        return [event async for event in (after(events(), seen) if seen else events())]

    for number, (position, _, _) in enumerate(whole):
        heard, seen = list(whole[: number + 1]), Position.parse(position)
        for pages in stored:
            for event in asyncio.run(connect(pages, seen)):
                heard.append((str(event.position), event.name, event.data))
                seen = event.position
        assert told(heard) == told(whole), position
        texts = [data["delta"] for _, name, data in heard if name == "text"]
        assert "".join(texts) == "".join(data["delta"] for _, name, data in whole if name == "text"), position
        pictures = [data["page"] for _, name, data in heard if name == "image"]
        assert sorted(set(pictures)) == [1, 2, 3]


def test_white_space_around_a_page_is_never_sent() -> None:
    numbering = Numbering("story_1")
    texts = ["  ", "  Once", "  Once ", "  Once upon", "  Once upon \n"]
    deltas = [event.data["delta"] for text in texts if (event := numbering.text(1, text))]
    assert deltas == ["Once", " upon"]


@pytest.mark.parametrize("last", ["nonsense", "1-text-5", "1-text-5.1-5-zzzzzz.0", "1-text-5.1-5-0.0\x00"])
def test_an_event_id_that_is_none_is_refused(tmp_path: Path, last: str) -> None:
    served = Served(tmp_path)
    story = served.post(BODY).json()
    reply = served.request("GET", f"/v1/stories/{story['id']}/events", headers={"Last-Event-ID": last.encode()})
    assert_error(reply, 422, param="Last-Event-ID", says=("no event id",))
    assert_error(served.request("GET", "/v1/stories/story_none/events"), 404)


def test_a_story_that_runs_elsewhere_can_be_followed(tmp_path: Path) -> None:
    """Another front over the same storage sees the pages as they are stored, and the end."""
    owner, other = Served(tmp_path, generator=FakeGenerator(delay_s=0.1)), Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        story = await owner.front.runner.start(to_story_request(CreateStory(**BODY), CONFIG))
        events = read_events((await client.get(f"/v1/stories/{story.id}/events")).text)
        assert told(events)[3]["whole"]["text"] == "Page 3 of 7."
        assert len({position for position, _, _ in events}) == len(events)
        assert events[-1][1] == "done"

    other.run(use)


# Deaths


def test_the_death_of_a_generator_is_got_over_at_any_point(tmp_path: Path) -> None:
    expected = Served(tmp_path / "whole").post(BODY).json()
    for num_events in range(16):
        served = Served(tmp_path / str(num_events), generator=LosingGenerator([num_events, num_events]))
        events = read_events(served.post({**BODY, "stream": True}).text)
        story = events[-1][2]
        assert story["status"] == "done", num_events
        assert [page["text"] for page in story["pages"]] == [page["text"] for page in expected["pages"]]
        assert {page: data["text"] for page, data in told(events).items() if page} == {
            page["index"]: page["text"] for page in expected["pages"]
        }
        assert len(served.decoder.requests) == 3  # no picture is drawn twice
        assert "restart" not in {name for _, name, _ in events}


def test_a_text_that_cannot_be_gone_on_with_is_begun_anew_and_clients_are_told(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=ChangingGenerator())
    events = read_events(served.post({**BODY, "stream": True}).text)
    assert [data["page"] for _, name, data in events if name == "restart"] == [2]
    pages = events[-1][2]["pages"]
    assert [page["text"] for page in pages] == ["Try 0, page 1 of 7.", "Try 1, page 2 of 7.", "Try 1, page 3 of 7."]
    assert [told(events)[page]["text"] for page in (1, 2, 3)] == [page["text"] for page in pages]


def test_the_death_of_a_decoder_is_got_over(tmp_path: Path) -> None:
    story = Served(tmp_path, decoder=LosingDecoder()).post(BODY).json()
    assert [("image" in page) for page in story["pages"]] == [True] * 3


def test_an_engine_that_dies_again_and_again_fails_the_story_and_what_was_finished_stays(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=LosingGenerator([6] + [0] * 20))
    reply = served.post(BODY)
    assert_error(reply, 500, says=("an engine's process died",))
    story = served.request("GET", reply.headers["location"]).json()
    assert (story["status"], story["pages"][0]["text"]) == ("failed", "Page 1 of 7.")


@pytest.mark.parametrize("seed", range(8))
def test_a_story_goes_on_when_the_front_died(tmp_path: Path, seed: int) -> None:
    """The front's tasks vanish at a random moment, as in a kill -9; another front takes up what is stored."""
    rng = random.Random(seed)
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.004))
    known: dict[str, bytes] = {}
    story_id = ""

    async def begin_and_die(client: httpx.AsyncClient) -> None:
        nonlocal story_id
        story = await served.front.runner.start(to_story_request(CreateStory(**BODY), CONFIG))
        story_id = story.id
        served.front.runner._end = never  # type: ignore[method-assign]
        await asyncio.sleep(rng.uniform(0, 0.06))

    async def never(*arguments: object) -> None:
        """What a dead process stores."""

    served.run(begin_and_die)
    let_writers_end()
    for page in served.store.load(story_id).pages:
        if page.image:  # a picture that is written and not yet its page's was never announced: it is drawn again
            path = tmp_path / "stories" / story_id / "pages" / str(page.index) / "picture.png"
            known[str(path)] = path.read_bytes()

    again = Served(tmp_path)

    async def recover(client: httpx.AsyncClient) -> None:
        await again.front.coordinator.recover()
        story = (await client.get(f"/v1/stories/{story_id}?wait=20")).json()
        assert story["status"] == "done"
        assert [page["text"] for page in story["pages"]] == [f"Page {n} of 7." for n in (1, 2, 3)]
        assert all("image" in page for page in story["pages"])

    again.run(recover)
    assert {path: Path(path).read_bytes() for path in known} == known
    assert len(again.decoder.requests) == 3 - len(known)
    assert again.store.running() == []


def test_a_front_that_is_stopped_leaves_its_stories_to_the_next(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.01))

    async def begin(client: httpx.AsyncClient) -> None:
        await client.post("/v1/stories", json={**BODY, "wait": False})
        await asyncio.sleep(0.1)

    served.run(begin)  # its event loop ends, and every task in it is cancelled
    [story_id] = served.store.running()
    assert served.store.load(story_id).status == "drawing"
    again = Served(tmp_path)

    async def recover(client: httpx.AsyncClient) -> None:
        await again.front.coordinator.recover()
        assert (await client.get(f"/v1/stories/{story_id}?wait=20")).json()["status"] == "done"

    again.run(recover)


def test_what_cannot_be_taken_up_does_not_stop_the_rest(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.store.mark("story_0", is_running=True)  # never accepted
    broken = served.post(BODY).json()["id"]
    served.store.mark(broken, is_running=True)
    (tmp_path / "stories" / broken / "story.json").write_text("{}")
    ended = served.post(BODY).json()["id"]
    served.store.mark(ended, is_running=True)
    asyncio.run(served.front.coordinator.recover())
    assert served.store.running() == [broken]
    assert served.store.load(ended).status == "done"


def test_vokens_that_are_stored_are_drawn_and_not_those_that_come_anew(tmp_path: Path) -> None:
    served = Served(tmp_path)
    story = served.post(BODY).json()
    for name in ("picture.png",):
        (tmp_path / "stories" / story["id"] / "pages" / "2" / name).unlink()
    page = served.store.load_page(story["id"], 2)
    served.store.save_page(story["id"], dataclasses.replace(page, image=None))
    stored = served.store.load_vokens(story["id"], 2)
    served.store.save_vokens(story["id"], dataclasses.replace(stored, hidden_VH=stored.hidden_VH + 1))
    served.store.mark(story["id"], is_running=True)
    state = dataclasses.replace(served.store.load(story["id"]), status="drawing")
    served.store.save(state)
    served.decoder.requests.clear()

    async def recover(client: httpx.AsyncClient) -> None:
        await served.front.coordinator.recover()
        assert (await client.get(f"/v1/stories/{story['id']}?wait=20")).json() == story

    served.run(recover)
    [request] = served.decoder.requests
    assert isinstance(request.vokens, Vokens) and (request.vokens.hidden_VH == stored.hidden_VH + 1).all()


# Waiting


def test_a_story_may_be_submitted_and_asked_for(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.01))

    async def use(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/stories", json={**BODY, "wait": False})
        assert (reply.status_code, reply.json()["status"]) == (202, "drawing")
        path = reply.headers["location"]
        assert path == f"/v1/stories/{reply.json()['id']}"
        soon = (await client.get(f"{path}?wait=0.02")).json()
        assert soon["status"] == "drawing"
        assert (await client.get(f"{path}?wait=20")).json()["status"] == "done"
        assert json.loads((tmp_path / "stories" / soon["id"] / "story.json").read_text())["status"] == "done"

    served.run(use)
    assert_error(served.request("GET", "/v1/stories/story_none?wait=1"), 404)
    assert_error(served.request("GET", "/v1/stories/story_none?wait=121"), 422, param="wait")


def test_the_same_key_is_the_same_story(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        async def post(key: str, **body: object) -> httpx.Response:
            headers = {"Idempotency-Key": key}
            return await client.post("/v1/stories", json={"prompt": "A fox", "pages": 2, **body}, headers=headers)

        first, second = await asyncio.gather(post("a"), post("a"))
        assert (first.status_code, first.json()) == (201, second.json())
        assert (await post("a")).json() == first.json()
        assert len(served.generator.requests) == 1
        streamed = read_events((await post("b", stream=True)).text)
        again = read_events((await post("b", stream=True)).text)
        assert again[-1][2] == streamed[-1][2] and streamed[-1][2]["id"] != first.json()["id"]
        assert_error(await post("a", pages=3), 409, param="Idempotency-Key", says=(first.json()["id"],))
        assert_error(await post("k" * 256), 422, param="idempotency-key")
        assert (await client.delete(first.headers["location"])).status_code == 204
        assert (await post("a")).status_code == 201  # the story that it had is deleted
        stranger = await client.post(
            "/v1/stories",
            json={"prompt": "A fox", "pages": 2},
            headers={"Idempotency-Key": "b", "Authorization": "Bearer other"},
        )
        assert stranger.json()["id"] != streamed[-1][2]["id"]

    served.run(use)


def test_a_story_left_to_a_model_without_its_sampler_is_drawn_with_the_model_s_own(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.01))

    async def begin(client: httpx.AsyncClient) -> None:
        await client.post("/v1/stories", json={**BODY, "wait": False, "scheduler": "pndm"})
        await asyncio.sleep(0.1)

    served.run(begin)
    [story_id] = served.store.running()
    flow = dataclasses.replace(served.front.config.draw, scheduler="euler")
    config = dataclasses.replace(
        served.front.config, schedulers=("euler",), draw=flow, draw_distilled=None, prefers_distilled=False
    )
    again = Served(tmp_path, config=config)

    async def recover(client: httpx.AsyncClient) -> None:
        await again.front.coordinator.recover()
        assert (await client.get(f"/v1/stories/{story_id}?wait=20")).json()["status"] == "done"

    again.run(recover)
    assert {request.settings.scheduler for request in again.decoder.requests} == {"euler"}


def test_a_story_waits_for_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader hears of no end before the story is done."""
    monkeypatch.setattr(coordinator, "RECOVER_S", 0.2)
    write, is_full = stored.write_whole, threading.Event()

    def write_where_there_is_room(files: fs.FileSystem, path: str, data: bytes, **options: Any) -> None:
        if is_full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(files, path, data, **options)

    port = find_free_port()
    listening = Listening(Served(tmp_path, generator=FakeGenerator(delay_s=0.05)), port)
    monkeypatch.setattr(stored, "write_whole", write_where_there_is_room)
    names: list[str] = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            story = client.post("/v1/stories", json={**BODY, "wait": False}).json()
            with client.stream("GET", f"/v1/stories/{story['id']}/events") as reply:
                for event in sse.read_events(reply.iter_bytes()):
                    names.append(event.name)
                    if event.name == "image" and not is_full.is_set():
                        is_full.set()
                        assert client.post("/v1/stories", json=BODY).status_code == 503
                        threading.Timer(1.0, is_full.clear).start()
            story = client.get(f"/v1/stories/{story['id']}").json()
    finally:
        listening.stop()
    assert names.count("page") == BODY["pages"] and names[-1] == "done"
    assert story["status"] == "done" and all("image" in page for page in story["pages"])
