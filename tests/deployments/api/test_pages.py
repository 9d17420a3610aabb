"""What can be done with a stored story: list, delete, go on, edit, draw again, export."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from deployments.api.pages import MAX_VARIANTS
from minigpt5.story.state import StoryState
from minigpt5.story.store import StoryStore
from tests.helpers.fakes import FakeDecoder, FakeGenerator
from tests.helpers.served import CONFIG, Served, assert_error

BODY = {"prompt": "A fox", "pages": 2, "seed": 7}


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


def test_stories_are_listed_newest_first_page_by_page(served: Served) -> None:
    ids = [served.post({**BODY, "pages": 1}).json()["id"] for _ in range(5)]
    found: list[str] = []
    after = ""
    while True:
        reply = served.request("GET", f"/v1/stories?limit=2{after}").json()
        found += [story["id"] for story in reply["data"]]
        after = f"&after={found[-1]}"
        if not reply["has_more"]:
            break
    assert found == ids[::-1]
    assert reply["object"] == "list" and reply["data"][0]["pages"][0]["image"]
    assert_error(served.request("GET", "/v1/stories?limit=101"), 422, param="limit", says=("100",))
    assert_error(served.request("GET", "/v1/stories?colour=red"), 422, param="colour")


def test_a_deleted_story_is_gone_and_its_work_ends(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.05))

    async def use(client: httpx.AsyncClient) -> None:
        path = (await client.post("/v1/stories", json={**BODY, "wait": False})).headers["location"]
        await asyncio.sleep(0.1)
        assert (await client.delete(path)).status_code == 204
        assert served.generator.num_closed == 1
        assert_error(await client.get(path), 404)
        assert_error(await client.delete(path), 404)
        assert not list((tmp_path / "stories").iterdir())
        assert served.store.running() == []

    served.run(use)


def test_a_story_goes_on_and_what_it_has_stays(served: Served, tmp_path: Path) -> None:
    story = served.post(BODY).json()
    path = f"/v1/stories/{story['id']}"
    before = {file: file.read_bytes() for file in (tmp_path / "stories").rglob("*.png")}
    more = served.request("POST", f"{path}/pages", json={"count": 2})
    assert more.status_code == 201
    assert more.json()["pages"][:2] == story["pages"]
    assert [page["text"] for page in more.json()["pages"]] == [f"Page {n} of 7." for n in (1, 2, 3, 4)]
    assert served.generator.requests[-1].given == ("Page 1 of 7.", "Page 2 of 7.")
    assert len(served.decoder.requests) == 4
    assert {file: file.read_bytes() for file in before} == before
    assert served.request("GET", path).json() == more.json()
    assert_error(served.request("POST", f"{path}/pages", json={"count": 61}), 422, param="count", says=("4 pages",))
    longest = served.request("POST", f"{path}/pages", json={"count": 60})
    assert longest.status_code == 201 and len(longest.json()["pages"]) == 64
    assert longest.json()["pages"][:4] == more.json()["pages"]
    assert_error(served.request("POST", f"{path}/pages", json={}), 422, param="count", says=("64 pages",))
    assert_error(served.request("POST", "/v1/stories/story_none/pages", json={}), 404)


def test_a_cancelled_story_goes_on_from_its_last_complete_page(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.03))

    async def use(client: httpx.AsyncClient) -> None:
        path = (await client.post("/v1/stories", json={**BODY, "pages": 4, "wait": False})).headers["location"]
        while len((await client.get(path)).json()["pages"]) < 2:
            await asyncio.sleep(0.01)
        assert (await client.post(f"{path}/cancel")).json()["status"] == "cancelled"
        story = (await client.post(f"{path}/pages", json={"count": 1})).json()
        texts = [page["text"] for page in story["pages"]]
        assert story["status"] == "done" and texts == [f"Page {n} of 7." for n in range(1, len(texts) + 1)]
        assert all("image" in page for page in story["pages"])

    served.run(use)


def test_an_edited_page_is_drawn_anew_and_the_others_stay(served: Served, tmp_path: Path) -> None:
    story = served.post({**BODY, "pages": 3}).json()
    path = f"/v1/stories/{story['id']}"
    vokens = served.request("GET", f"{path}/pages/3/vokens").content
    served.decoder.requests.clear()
    reply = served.request("PATCH", f"{path}/pages/2", json={"text": " A dragon comes. "})
    assert reply.status_code == 200
    assert (reply.json()["text"], "image" in reply.json()) == ("A dragon comes.", True)
    assert served.generator.requests[-1].given == ("Page 1 of 7.", "A dragon comes.", "Page 3 of 7.")
    assert [request.vokens.page for request in served.decoder.requests] == [2]
    now = served.request("GET", path).json()
    assert [now["pages"][k] for k in (0, 2)] == [story["pages"][k] for k in (0, 2)]
    assert now["status"] == "done"
    assert served.request("GET", f"{path}/pages/3/vokens").content == vokens


def test_an_edit_that_is_turned_away_changes_nothing(tmp_path: Path) -> None:
    served = Served(tmp_path, max_running=1)

    async def use(client: httpx.AsyncClient) -> None:
        story = (await client.post("/v1/stories", json=BODY)).json()
        path = f"/v1/stories/{story['id']}"
        served.generator.gate.clear()
        other = asyncio.create_task(client.post("/v1/stories", json=BODY))
        while len(served.generator.requests) < 2:
            await asyncio.sleep(0.01)
        assert_error(await client.patch(f"{path}/pages/1", json={"text": "A dragon comes."}), 503, says=("limit is 1",))
        assert (await client.get(path)).json() == story
        assert (await client.get(f"{path}/pages/1.png")).status_code == 200
        assert len(served.store.running()) == 1  # the other one
        served.generator.gate.set()
        await other

    served.run(use)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "either"),
        ({"text": "a", "variant": 0}, "either"),
        ({"text": "  "}, "empty"),
        ({"variant": 1}, "1 pictures"),
    ],
)
def test_a_change_that_is_none_is_refused(served: Served, body: dict[str, object], says: str) -> None:
    path = f"/v1/stories/{served.post(BODY).json()['id']}/pages/1"
    reply = served.request("PATCH", path, json=body)
    assert reply.status_code == 422 and says in reply.json()["error"]["message"]
    assert served.request("GET", path + ".png").status_code == 200


def test_a_page_is_drawn_again_and_every_picture_is_kept(served: Served) -> None:
    story = served.post(BODY).json()
    path = f"/v1/stories/{story['id']}/pages/1"
    first = served.request("GET", f"{path}.png").content
    reply = served.request("POST", f"{path}/redraw", json={"seed": 5, "steps": 2})
    assert reply.status_code == 201
    page = reply.json()
    assert (page["variant"], [one["seed"] for one in page["variants"]]) == (1, [story["pages"][0]["image"]["seed"], 5])
    assert (page["variants"][1]["steps"], page["variants"][1]["guidance_scale"]) == (2, 2.5)
    assert len(served.generator.requests) == 1
    second = served.request("GET", f"{path}.png").content
    assert second != first
    assert served.request("GET", page["variants"][0]["url"]).content == first
    assert served.request("GET", f"{path}.png?variant=1").content == second
    assert_error(served.request("GET", f"{path}.png?variant=2"), 404)
    chosen = served.request("PATCH", path, json={"variant": 0}).json()
    assert chosen["variant"] == 0 and chosen["image"] == story["pages"][0]["image"]
    assert served.request("GET", f"{path}.png").content == first
    assert served.request("GET", f"/v1/stories/{story['id']}").json()["pages"][0] == chosen


def test_variants_stay_when_the_story_goes_on(served: Served) -> None:
    story = served.post(BODY).json()
    path = f"/v1/stories/{story['id']}"
    page = served.request("POST", f"{path}/pages/1/redraw", json={"seed": 5}).json()
    more = served.request("POST", f"{path}/pages", json={"count": 1}).json()
    assert more["pages"][0] == page


def test_a_page_has_so_many_pictures_and_not_more(served: Served) -> None:
    path = f"/v1/stories/{served.post(BODY).json()['id']}/pages/1/redraw"
    for _ in range(MAX_VARIANTS - 1):
        assert served.request("POST", path, json={}).status_code == 201
    assert_error(served.request("POST", path, json={}), 409, says=(f"{MAX_VARIANTS} pictures",))


def test_a_page_whose_picture_failed_is_drawn_by_a_redraw(tmp_path: Path) -> None:
    decoder = FakeDecoder(fails_on_page=1)
    served = Served(tmp_path, decoder=decoder)
    path = f"/v1/stories/{served.post(BODY).json()['id']}/pages/1"
    assert_error(served.request("POST", f"{path}/redraw", json={}), 500)
    decoder.fails_on_page = None
    page = served.request("POST", f"{path}/redraw", json={}).json()
    assert "error" not in page and len(page["variants"]) == 1


def test_a_picture_that_failed_is_drawn_as_its_story_asked(tmp_path: Path) -> None:
    decoder = FakeDecoder(fails_on_page=2)
    config = dataclasses.replace(CONFIG, styles=("ink",))
    served = Served(tmp_path, decoder=decoder, config=config)
    asked = {"width": 64, "height": 128, "steps": 9, "guidance_scale": 4.0, "style": "ink"}
    story = served.post({**BODY, "pages": 2, **asked}).json()
    decoder.fails_on_page = None
    for page in (1, 2):
        served.request("POST", f"/v1/stories/{story['id']}/pages/{page}/redraw", json={"seed": 1})
    *_, first, second = (request.settings for request in decoder.requests)
    assert first == second and {name: getattr(second, name) for name in asked} == asked


def test_a_story_that_is_being_made_is_not_changed(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        path = (await client.post("/v1/stories", json=BODY)).headers["location"]
        served.generator.gate.clear()
        going_on = asyncio.create_task(client.post(f"{path}/pages", json={"count": 1}))
        while len(served.generator.requests) < 2:
            await asyncio.sleep(0.01)
        for method, rest, body in (
            ("POST", "/pages", {"count": 1}),
            ("PATCH", "/pages/1", {"text": "No."}),
            ("POST", "/pages/1/redraw", {}),
        ):
            assert_error(await client.request(method, path + rest, json=body), 409, says=("being worked on",))
        served.generator.gate.set()
        assert (await going_on).json()["status"] == "done"

    served.run(use)


def test_books_can_be_fetched(served: Served) -> None:
    path = f"/v1/stories/{served.post(BODY).json()['id']}"
    html, epub = served.request("GET", f"{path}.html"), served.request("GET", f"{path}.epub")
    assert html.headers["content-type"].startswith("text/html") and "sandbox" in html.headers["content-security-policy"]
    assert html.text.count("data:image/png;base64") == 2
    assert epub.headers["content-type"] == "application/epub+zip" and epub.content.startswith(b"PK")
    assert_error(served.request("GET", "/v1/stories/story_none.html"), 404)


@pytest.mark.parametrize(
    ("method", "path", "body"), [("POST", "pages", {"count": 1, "wait": False}), ("PATCH", "pages/1", {"text": "New."})]
)
def test_who_leaves_while_a_change_is_stored_leaves_a_story_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: dict[str, object]
) -> None:
    served = Served(tmp_path)
    story = served.post(BODY).json()["id"]
    stored, go_on, save = threading.Event(), threading.Event(), StoryStore.save

    def slow(store: StoryStore, state: StoryState) -> None:
        save(store, state)
        stored.set()
        go_on.wait(5)

    async def use(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(StoryStore, "save", slow)
        task = asyncio.create_task(client.request(method, f"/v1/stories/{story}/{path}", json=body))
        await asyncio.to_thread(stored.wait, 5)
        task.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.wait({task})
        assert served.store.load(story).status == "drawing" and served.store.running() == [story]
        await served.front.coordinator.recover()
        await served.front.relay.wait(story, 10)

    served.run(use)
    assert served.store.load(story).status == "done" and served.store.running() == []


def test_an_edit_whose_story_fails_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    story = served.post(BODY).json()["id"]

    async def generate(request: object) -> AsyncGenerator[None]:
        raise RuntimeError("the generator broke")
        yield

    monkeypatch.setattr(served.front.engines, "generate", generate)
    reply = served.request("PATCH", f"/v1/stories/{story}/pages/1", json={"text": "A new text."})
    assert_error(reply, 500, says=(f"{story} failed",))
    assert reply.json()["error"]["code"] == "story_failed"
    assert served.store.load(story).pages[0].text == "A new text."


def test_an_edit_of_a_cancelled_story_makes_no_further_pages(served: Served) -> None:
    story = served.post({**BODY, "pages": 4}).json()["id"]
    state = served.store.load(story)
    served.store.save(dataclasses.replace(state, status="cancelled"))
    for page in (3, 4):  # it never came to these
        shutil.rmtree(Path(served.store.uri) / "stories" / story / "pages" / str(page))
    reply = served.request("PATCH", f"/v1/stories/{story}/pages/1", json={"text": "A new text."})
    assert reply.status_code == 200 and reply.json()["image"]
    assert [page.text for page in served.store.load(story).pages] == ["A new text.", state.pages[1].text]
