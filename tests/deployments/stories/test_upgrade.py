"""Another model goes live while stories are made: no page mixes one model's vokens with another's decoder, finished
pages stay, and each page says which model wrote it and which one drew it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.engines import handover
from minigpt5.config import ModelConfig
from minigpt5.types import DecoderEvent, DrawRequest, GeneratorEvent, StoryRequest, TextDelta, Vokens
from tests.deployments.stories.test_resume import told
from tests.helpers.fakes import FINGERPRINT as OLD
from tests.helpers.fakes import FakeDecoder, FakeGenerator
from tests.helpers.served import CONFIG, Served, assert_error, read_events

NEW = "cd" * 32
NEW_CONFIG: ModelConfig = dataclasses.replace(CONFIG, fingerprint=NEW)
BODY = {"prompt": "A fox", "pages": 16, "seed": 7}


class NewGenerator(FakeGenerator):
    """Writes "Leaf <n> of <seed>."."""

    fingerprint = NEW

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        async for event in super().generate(request):
            if isinstance(event, TextDelta) and event.page > len(request.previous) + len(request.given):
                event = dataclasses.replace(event, text=event.text.replace("Page", "Leaf"))
            yield event


class Upgraded(Served):
    """The front of the old model. The generator changes after so many pages, the decoder after so many calls; calls
    that have begun go on at the old engine, as Serve lets them."""

    def __init__(self, storage: Path, *, generator_after: int, decoder_after: int) -> None:
        self.old, self.new = FakeGenerator(delay_s=0.001), NewGenerator(delay_s=0.001)
        self.old_decoder, self.new_decoder = FakeDecoder(), FakeDecoder(fingerprint=NEW)
        self.generator_after, self.decoder_after = generator_after, decoder_after
        self.num_pages = self.num_calls = 0
        super().__init__(storage)
        self.front.engines.generate, self.front.engines.decode = self._generate, self._decode  # type: ignore[method-assign]

    async def _generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        engine = self.old if self.num_pages < self.generator_after else self.new
        async for event in engine.generate(request):
            self.num_pages += isinstance(event, Vokens)
            yield event

    async def _decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        engine = self.old_decoder if self.num_calls < self.decoder_after else self.new_decoder
        self.num_calls += 1
        async for event in engine.decode(request):
            yield event


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "UPGRADE_PAUSE_S", 0.01)


def handover_pages(story: dict[str, Any], events: list[tuple[str, str, dict[str, Any]]]) -> tuple[int, int]:
    """The page from which the new model wrote, and the one from which it drew."""
    assert story["status"] == "done"
    pages = story["pages"]
    assert [page["index"] for page in pages] == list(range(1, 17))
    for page in pages:
        word = {OLD: "Page", NEW: "Leaf"}[page["fingerprint"]]
        assert page["text"] == f"{word} {page['index']} of 7."
        assert page["variants"][0]["fingerprint"] == page["image"]["fingerprint"]
    writers, drawers = [p["fingerprint"] for p in pages], [p["image"]["fingerprint"] for p in pages]
    assert writers == sorted(writers) and set(drawers) <= {OLD, NEW}  # OLD < NEW
    assert [told(events)[page["index"]]["text"] for page in pages] == [page["text"] for page in pages]
    return writers.count(OLD) + 1, drawers.index(NEW) + 1 if NEW in drawers else 17


@pytest.mark.parametrize("feedback", ["text", "pictures"])
@pytest.mark.parametrize(("generator_after", "decoder_after"), [(3, 3), (6, 2), (2, 8), (1, 0), (0, 4), (99, 99)])
def test_a_story_is_handed_over_at_a_page(
    tmp_path: Path, generator_after: int, decoder_after: int, feedback: str
) -> None:
    served = Upgraded(tmp_path, generator_after=generator_after, decoder_after=decoder_after)
    events = read_events(served.post({**BODY, "stream": True, "feedback": feedback}).text)
    writes_from, draws_from = handover_pages(events[-1][2], events)
    if generator_after == 99:
        assert (writes_from, draws_from) == (17, 17)
    else:
        assert writes_from <= 16 and draws_from <= 16
    assert "restart" not in {name for _, name, _ in events}  # no page was torn
    for decoder, fingerprint in ((served.old_decoder, OLD), (served.new_decoder, NEW)):
        refused = [request for request in decoder.requests if request.vokens.fingerprint != fingerprint]
        assert len(decoder.requests) - len(refused) <= 16
    assert len(served.old_decoder.requests) + len(served.new_decoder.requests) < 200
    state = served.store.load(events[-1][2]["id"])
    for page in state.pages:
        assert page.image
        assert served.store.load_vokens(state.id, page.index).fingerprint == page.image.fingerprint


async def until(client: httpx.AsyncClient, story_id: str, num_pictures: int) -> None:
    """Until so many pages of a story have their pictures."""
    while True:
        pages = (await client.get(f"/v1/stories/{story_id}")).json()["pages"]
        if sum("image" in page for page in pages) >= num_pictures:
            return
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("num_pictures", [0, 1, 4, 9])
def test_the_next_servers_model_goes_on_with_what_is_stored_and_back(tmp_path: Path, num_pictures: int) -> None:
    """A server ends in the middle of a story, one of another model starts, and after it the first one again."""
    old = Served(tmp_path, generator=FakeGenerator(delay_s=0.02))
    new = Served(
        tmp_path,
        generator=NewGenerator(delay_s=0.02),
        decoder=FakeDecoder(fingerprint=NEW),
        config=NEW_CONFIG,
    )
    story_id = ""

    async def begin(client: httpx.AsyncClient) -> None:
        nonlocal story_id
        story_id = (await client.post("/v1/stories", json={**BODY, "wait": False})).json()["id"]
        await until(client, story_id, num_pictures)

    async def go_on(client: httpx.AsyncClient) -> None:
        await new.front.coordinator.recover()
        await until(client, story_id, num_pictures + 2)

    stories: list[dict[str, Any]] = []

    async def end(client: httpx.AsyncClient) -> None:
        await again.front.coordinator.recover()
        await client.get(f"/v1/stories/{story_id}?wait=20")
        stories.append((await client.get(f"/v1/stories/{story_id}")).json())

    old.run(begin)
    pictures = {path: path.read_bytes() for path in tmp_path.glob("stories/*/pages/*/picture.png")}
    shown = [page.index for page in old.store.load(story_id).pages if page.image]
    new.run(go_on)
    again = Served(tmp_path, generator=FakeGenerator(delay_s=0.001))
    again.run(end)
    [story] = stories
    assert story["status"] == "done"
    assert [page["index"] for page in story["pages"]] == list(range(1, 17))
    for page in story["pages"]:
        assert page["text"].startswith({OLD: "Page", NEW: "Leaf"}[page["fingerprint"]])
        assert page["image"]["fingerprint"] in (OLD, NEW)
    assert {page["image"]["fingerprint"] for page in story["pages"]} == {OLD, NEW}
    for path, data in pictures.items():
        assert int(path.parent.name) not in shown or path.read_bytes() == data
    for decoder, fingerprint in ((new.decoder, NEW), (again.decoder, OLD)):
        assert {request.vokens.fingerprint for request in decoder.requests} <= {fingerprint}


def test_engines_that_stay_of_two_models_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "UPGRADE_S", 0.05)
    served = Served(tmp_path, decoder=FakeDecoder(fingerprint=NEW))
    story = served.post({**BODY, "pages": 2}).json()
    assert [page["error"] for page in story["pages"]] == ["vokens of another model"] * 2


def test_a_page_of_another_model_is_read_again_before_it_is_redrawn(tmp_path: Path) -> None:
    story = Served(tmp_path).post({**BODY, "pages": 3}).json()
    new = Served(tmp_path, generator=NewGenerator(), decoder=FakeDecoder(fingerprint=NEW), config=NEW_CONFIG)
    page = new.post({"seed": 5}, f"/v1/stories/{story['id']}/pages/2/redraw").json()
    assert (page["text"], page["fingerprint"]) == ("Page 2 of 7.", OLD)
    assert [variant["fingerprint"] for variant in page["variants"]] == [OLD, NEW]
    [request] = new.generator.requests
    assert request.given == ("Page 1 of 7.", "Page 2 of 7.")
    assert new.store.load_vokens(story["id"], 2).fingerprint == NEW
    longer = new.post({"count": 1}, f"/v1/stories/{story['id']}/pages").json()
    assert [page["fingerprint"] for page in longer["pages"]] == [OLD, OLD, OLD, NEW]
    assert [page["image"]["fingerprint"] for page in longer["pages"]] == [OLD, NEW, OLD, NEW]


def test_a_story_that_the_new_model_cannot_write_ends_and_says_why(tmp_path: Path) -> None:
    old = Served(tmp_path)

    async def begin(client: httpx.AsyncClient) -> None:
        old.generator.gate.clear()
        await client.post("/v1/stories", json={**BODY, "wait": False})

    old.run(begin)
    [story_id] = old.store.running()
    new = Served(tmp_path, generator=NewGenerator(max_words=1), config=NEW_CONFIG)
    asyncio.run(new.front.coordinator.recover())
    state = new.store.load(story_id)
    assert (state.status, state.error) == ("failed", "prompt takes 2 tokens but the window is 1")
    assert new.store.running() == [] and new.front.leases.held == {}
    assert_error(new.request("GET", "/v1/stories/story_none"), 404)


def test_pictures_outside_of_stories_are_drawn_by_one_model_too(tmp_path: Path) -> None:
    """The decoder is replaced between a text and its picture."""
    for number, (path, body) in enumerate(
        [
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "Draw"}], "seed": 7, "modalities": ["text", "image"]},
            ),
            ("/v1/images/generations", {"prompt": "A fox", "n": 2}),
            ("/v1/images/generations", {"prompt": "A fox", "stream": True}),
        ]
    ):
        served = Upgraded(tmp_path / str(number), generator_after=2, decoder_after=0)
        reply = served.post(body, path)
        assert reply.status_code == 200 and "error" not in reply.text
        assert not served.old_decoder.requests
        drawn = [one.vokens for one in served.new_decoder.requests if one.vokens.fingerprint == NEW]
        assert len(drawn) == body.get("n", 1) and {vokens.page for vokens in drawn} == {1}
        asked = served.new.requests[-1]
        assert (asked.mode, asked.prompt_text) == ("caption", "A fox" if "prompt" in body else "Page 1 of 7.")
