"""The HTTP contract, with fake engines behind the real front."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.api.images import CreateImages, Output
from deployments.api.routes import create_api
from deployments.engines import handover
from deployments.schemas import CreateStory, to_story_request
from deployments.stories.events import Position
from minigpt5.story.stream import page_seed
from minigpt5.story.voken_file import pack, unpack
from minigpt5.types import DecoderEvent, DrawRequest, DrawSettings
from tests.helpers.fakes import FINGERPRINT, PREVIEW, FakeDecoder, FakeGenerator, make_png
from tests.helpers.picture_files import png_header
from tests.helpers.served import CONFIG, VOKENS, Served, assert_error, data_url, read_events, under


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


# A story


def test_a_story_comes_back_whole(served: Served) -> None:
    reply = served.post({"prompt": "A fox", "seed": 7})
    story = reply.json()
    assert reply.status_code == 201
    assert reply.headers["location"] == f"/v1/stories/{story['id']}"
    assert (story["object"], story["status"], story["model"], story["prompt"]) == (
        "story",
        "done",
        "storybook",
        "A fox",
    )
    assert story["seed"] == 7
    assert [page["text"] for page in story["pages"]] == [f"Page {n} of 7." for n in (1, 2, 3, 4)]
    assert story["pages"][1]["image"] == {
        "url": f"/v1/stories/{story['id']}/pages/2.png",
        "width": 16,
        "height": 16,
        "seed": page_seed(7, 2),
        "fingerprint": FINGERPRINT,
    }
    assert story["pages"][1]["fingerprint"] == FINGERPRINT
    assert story["usage"] == {"prompt_tokens": 5, "completion_tokens": 48, "images": 4, "denoise_steps": 12}
    assert isinstance(story["created"], int)


def test_a_finished_story_and_its_pictures_can_be_fetched(served: Served) -> None:
    story = served.post({"prompt": "A fox", "pages": 2}).json()
    assert served.request("GET", f"/v1/stories/{story['id']}").json() == story
    picture = served.request("GET", story["pages"][1]["image"]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    assert served.store.load_vokens(story["id"], 2).fingerprint == FINGERPRINT


def test_optional_fields_reach_the_engines_and_the_rest_are_the_folders_defaults(served: Served) -> None:
    served.post({"prompt": "A fox", "pages": 1, "steps": 5, "temperature": 0, "scheduler": "pndm", "top_p": 1})
    request = served.generator.requests[0]
    assert request.sampling == dataclasses.replace(CONFIG.sampling, temperature=0, top_p=1)
    assert request.draw == DrawSettings(steps=5, guidance_scale=2.5, scheduler="pndm")
    assert served.decoder.requests[0].settings == request.draw


def test_without_a_seed_stories_differ(served: Served) -> None:
    first, second = (served.post({"prompt": "A fox", "pages": 1}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["id"] != second["id"]


def test_pictures_in_the_prompt_reach_the_generator(served: Served) -> None:
    parts = [
        {"type": "text", "text": "Go on from"},
        {"type": "image", "image": data_url(make_png())},
    ]
    story = served.post({"prompt": parts, "pages": 1}).json()
    assert story["prompt"] == "Go on from"
    text, image = served.generator.requests[0].prompt
    assert text == "Go on from"
    assert image.data == make_png()  # type: ignore[union-attr]


# The stream


def test_a_stream_has_every_event_in_order(served: Served) -> None:
    reply = served.post({"prompt": "A fox", "pages": 2, "seed": 7, "stream": True})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = read_events(reply.text)
    assert events[0][1:] == ("story", {"id": events[0][2]["id"], "seed": 7})
    story_id = events[0][2]["id"]
    for page in (1, 2):
        own = [name for _, name, data in events if data.get("page", data.get("index")) == page]
        assert own == sorted(own, key=["text", "slot", "progress", "image", "page"].index)
        assert set(own) == {"text", "slot", "progress", "image", "page"}
        text = "".join(data["delta"] for _, name, data in events if name == "text" and data["page"] == page)
        assert text == f"Page {page} of 7."
        steps = [
            (data["step"], data["steps"]) for _, name, data in events if name == "progress" and data["page"] == page
        ]
        assert steps == [(1, 3), (2, 3), (3, 3)]
    text_pages = [data["page"] for _, name, data in events if name == "text"]
    assert text_pages == sorted(text_pages)
    image = next(data for _, name, data in events if name == "image" and data["page"] == 1)
    assert image["url"] == f"/v1/stories/{story_id}/pages/1.png"
    assert set(image) == {"page", "url", "width", "height", "seed"}
    assert events[-1][1] == "done"
    assert events[-1][2] == served.request("GET", f"/v1/stories/{story_id}").json()


def test_every_event_id_is_a_position_of_its_own(served: Served) -> None:
    reply = served.post({"prompt": "A fox", "seed": 7, "stream": True})
    ids = [position for position, _, _ in read_events(reply.text)]
    assert len(set(ids)) == len(ids)
    kinds = {position.partition(".")[0] for position in ids}
    assert {"0-story-0", "1-text-12", "2-slot-0", "3-progress-2", "4-image-0", "4-page-0", "4-done-0"} <= kinds
    assert all(str(Position.parse(position)) == position for position in ids)


def test_what_is_announced_can_be_fetched_at_once(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.002))

    async def use(client: httpx.AsyncClient) -> None:
        story = await served.front.runner.start(to_story_request(CreateStory(prompt="A fox"), CONFIG))
        async for event in story.follow():
            data = event.data
            if event.name == "image":
                assert (await client.get(data["url"])).status_code == 200
            if event.name == "page":
                pages = (await client.get(f"/v1/stories/{story.id}")).json()["pages"]
                assert data in pages

    served.run(use)


def test_a_story_is_finished_though_its_client_went_away(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        served.generator.gate.clear()
        asking = asyncio.create_task(client.post("/v1/stories", json={"prompt": "A fox", "pages": 2}))
        while not served.generator.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        [story_id] = [path.name for path in (tmp_path / "stories").iterdir()]
        assert (await client.get(f"/v1/stories/{story_id}")).json()["status"] == "drawing"
        served.generator.gate.set()
        while (story := (await client.get(f"/v1/stories/{story_id}")).json())["status"] == "drawing":
            await asyncio.sleep(0.01)
        assert story["status"] == "done"
        assert len(story["pages"]) == 2
        await served.front.relay.wait(story_id)  # the reader may have been quicker than the end
        assert served.front.admission.num_running == 0

    served.run(use)


# Failures


def test_a_failed_picture_stays_on_its_page(tmp_path: Path) -> None:
    served = Served(tmp_path, decoder=FakeDecoder(fails_on_page=2))
    story = served.post({"prompt": "A fox", "pages": 3}).json()
    assert story["status"] == "done"
    assert story["pages"][1]["error"] == "the decoder broke"
    assert "image" not in story["pages"][1]
    assert [("image" in page) for page in story["pages"]] == [True, False, True]
    assert_error(served.request("GET", f"/v1/stories/{story['id']}/pages/2.png"), 404, says=("page 2",))


def test_a_broken_generator_fails_the_story_and_keeps_what_was_finished(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(fails_on_page=3, delay_s=0.02))
    reply = served.post({"prompt": "A fox"})
    assert_error(reply, 500, says=("the generator broke", "/v1/stories/story_"))
    story = served.request("GET", reply.headers["location"]).json()
    assert (story["status"], story["error"]) == ("failed", "the generator broke")
    assert len(story["pages"]) == 2
    events = read_events(served.post({"prompt": "A fox", "stream": True}).text)
    assert events[-1][1] == "error"
    assert events[-1][2]["error"]["message"] == "the generator broke"
    assert served.front.admission.num_running == 0


def test_a_decoder_of_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "UPGRADE_S", 0.0)
    served = Served(tmp_path, decoder=FakeDecoder(fingerprint="cd" * 32))
    story = served.post({"prompt": "A fox", "pages": 1}).json()
    assert story["pages"][0]["error"] == "vokens of another model"
    assert_error(served.request("GET", "/readyz"), 503, says=("different models",))
    assert_error(served.post({"prompt": "A fox"}, "/v1/images/generations"), 500, says=("another model",))


def test_a_full_server_says_when_to_come_back(tmp_path: Path) -> None:
    served = Served(tmp_path, max_running=1)

    async def use(client: httpx.AsyncClient) -> None:
        served.generator.gate.clear()
        first = asyncio.create_task(client.post("/v1/stories", json={"prompt": "A fox", "pages": 1}))
        while not served.generator.requests:
            await asyncio.sleep(0.01)
        for path in ("/v1/stories", "/v1/images/generations"):
            reply = await client.post(path, json={"prompt": "A fox"})
            assert_error(reply, 503, says=("limit is 1",))
            assert int(reply.headers["retry-after"]) >= 1
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        served.generator.gate.set()
        assert (await first).status_code == 201
        assert (await client.get("/readyz")).status_code == 200

    served.run(use)


def test_an_unexpected_failure_has_the_same_shape(served: Served) -> None:
    def fail(story_id: str) -> None:
        raise RuntimeError("secret detail")

    served.store.load = fail  # type: ignore[assignment,method-assign]
    reply = served.request("GET", "/v1/stories/story_1")
    assert_error(reply, 500)
    assert "secret" not in reply.text


# Bad input

BAD_STORIES: list[tuple[dict[str, object], str, tuple[str, ...]]] = [
    ({"prompt": ""}, "prompt", ("prompt is empty", '""', "16000")),
    ({"prompt": "  \n"}, "prompt", ("prompt is empty",)),
    ({"prompt": "x" * 16_001}, "prompt", ("16001", "16000")),
    ({"prompt": []}, "prompt", ("prompt is []", "at least 1")),
    ({"prompt": [{"type": "text", "text": " "}]}, "prompt", ("prompt is empty",)),
    ({"prompt": 5}, "prompt", ("prompt is 5",)),
    ({}, "prompt", ("prompt is missing",)),
    ({"prompt": [{"type": "video"}]}, "prompt[0]", ("video", '"type": "text"')),
    ({"prompt": ["A fox"]}, "prompt[0]", ("A fox",)),
    ({"prompt": [{"type": "text", "text": "a"}, {"type": "image"}]}, "prompt[1].image", ("missing",)),
    ({"prompt": [{"type": "text", "text": "a", "x": 1}]}, "prompt[0].x", ("not a field",)),
    ({"prompt": "A fox", "pages": 0}, "pages", ("pages is 0", "greater than or equal to 1")),
    ({"prompt": "A fox", "pages": 65}, "pages", ("pages is 65", "less than or equal to 64")),
    ({"prompt": "A fox", "pages": "4"}, "pages", ('pages is "4"', "integer")),
    ({"prompt": "A fox", "pages": True}, "pages", ("pages is true", "integer")),
    ({"prompt": "A fox", "pages": 2.5}, "pages", ("pages is 2.5", "integer")),
    ({"prompt": "A fox", "colour": "red"}, "colour", ("colour", '"red"', "not a field")),
    ({"prompt": "A fox", "seed": -1}, "seed", ("seed is -1",)),
    ({"prompt": "A fox", "seed": 2**53}, "seed", (str(2**53),)),
    ({"prompt": "A fox", "steps": 101}, "steps", ("steps is 101", "100")),
    ({"prompt": "A fox", "guidance_scale": 0.5}, "guidance_scale", ("0.5", "1")),
    ({"prompt": "A fox", "scheduler": "eulers"}, "scheduler", ('"eulers"', "ddim")),
    ({"prompt": "A fox", "scheduler": "euler"}, "scheduler", ("'euler'", "ddim, pndm, dpm-solver++, sde-dpm-solver++")),
    ({"prompt": "A fox", "width": 15}, "width", ("width is 15", "from 16 to 4096")),
    ({"prompt": "A fox", "width": 0}, "width", ("width is 0",)),
    ({"prompt": "A fox", "height": 4097}, "height", ("height is 4097", "4096")),
    ({"prompt": "A fox", "height": 64.5}, "height", ("height is 64.5", "integer")),
    ({"prompt": "A fox", "temperature": -0.1}, "temperature", ("-0.1",)),
    ({"prompt": "A fox", "top_p": 0}, "top_p", ("top_p is 0",)),
    ({"prompt": "A fox", "max_page_tokens": 0}, "max_page_tokens", ("max_page_tokens is 0",)),
    ({"prompt": "A fox", "feedback": "sounds"}, "feedback", ('feedback is "sounds"', "pictures")),
    ({"prompt": "word " * 200}, "prompt", ("200 tokens", "100")),
]


@pytest.mark.parametrize(("body", "param", "says"), BAD_STORIES, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named_with_its_value_and_limit(
    served: Served, body: dict[str, object], param: str, says: tuple[str, ...]
) -> None:
    assert_error(served.post(body), 422, param=param, says=says)
    assert_error(served.post({**body, "stream": True}), 422, param=param, says=says)
    assert served.front.admission.num_running == 0
    assert served.post({"prompt": "A fox", "pages": 1}).status_code == 201  # the server lives on


BAD_IMAGES = {
    "text": (data_url(b"not a picture at all"), "is no picture that can be read (20 bytes"),
    "cut off": (data_url(make_png(size=(64, 64))[:-40]), "PNG file that is damaged or ends early"),
    "only a header": (data_url(make_png()[:20]), "PNG file that is damaged or ends early"),
    "another format": (data_url(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "image/gif"), "is a GIF picture: send a PNG"),
    "HEIC": (data_url(b"\0\0\0\x18ftypheic\0\0\0\0", "image/heic"), "is a HEIC picture"),
    "SVG as text": ("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
    "address": ("https://example.com/x.png", "must be a data URL"),
    "file": ("file:///etc/passwd", "must be a data URL"),
    "no base64": ("data:image/png,abc", "is no picture that can be read (3 bytes"),
    "no comma": ("data:image/png;base64", "does not begin with data:"),
    "broken base64": ("data:image/png;base64,@@@@", "base64 is broken"),
    "cut-off base64": ("data:image/png;base64,iVBOR", "base64 is broken"),
    "empty": ("", "must be a data URL"),
    "nothing in it": ("data:image/png;base64,", "is empty (0 bytes)"),
    "too many pixels": (data_url(png_header(6000, 6000)), "6000 x 6000 pixels but must have from 1 to 33554432"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_is_none_is_named_by_its_place(served: Served, name: str) -> None:
    url, says = BAD_IMAGES[name]
    parts = [{"type": "text", "text": "Go on"}, {"type": "image", "image": url}]
    reply = served.post({"prompt": parts})
    assert_error(reply, 422, param="prompt[1].image", says=("prompt[1].image", says))
    assert len(reply.text) < 400
    assert not served.generator.requests


@pytest.mark.parametrize(
    "url", [data_url(make_png()).replace("data:image", "DATA:IMAGE").replace("=", ""), "\n" + data_url(make_png())]
)
def test_a_data_url_is_read_as_browsers_and_libraries_write_it(served: Served, url: str) -> None:
    """Its kinds are in tests/minigpt5/test_data_url.py."""
    assert served.post({"prompt": [{"type": "image", "image": url}], "pages": 1}).status_code == 201
    [part] = served.generator.requests[0].prompt
    assert part.data == make_png()  # type: ignore[union-attr]


def test_a_picture_is_handed_on_as_it_came(served: Served) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "WEBP", lossless=True)
    served.post({"prompt": [{"type": "image", "image": data_url(file.getvalue(), "image/webp")}], "pages": 1})
    [part] = served.generator.requests[0].prompt
    assert part.data == file.getvalue()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"\xff\xfe", {"content-type": "application/json"}, 400),
        (b"[1]", {"content-type": "application/json"}, 422),
        (b"", {"content-type": "application/json"}, 422),
        (b'{"prompt": "A fox"}', {"content-type": "application/x-www-form-urlencoded"}, 422),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b'{"prompt": "A fox", "pages": ' + b"9" * 5000 + b"}", {"content-type": "application/json"}, 400),
        (b'{"prompt": "A fox", "guidance_scale": NaN}', {"content-type": "application/json"}, 422),
    ],
)
def test_a_body_that_is_no_object_is_refused(
    served: Served, content: bytes, headers: dict[str, str], status: int
) -> None:
    reply = served.request("POST", "/v1/stories", content=content, headers=headers)
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/stories", "/v1/images/generations"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_refused_unread(served: Served, path: str, is_chunked: bool) -> None:
    num_read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(64):
            num_read += 1
            yield b"x" * 2**20

    content = chunks() if is_chunked else b"x" * (8 * 2**20 + 1)
    reply = served.request("POST", path, content=content, headers={"content-type": "application/json"})
    assert_error(reply, 413, says=("8388608",))
    assert num_read <= 10


def test_a_body_at_the_limit_is_read(served: Served) -> None:
    body = b'{"prompt": "A fox", "pages": 1' + b" " * (8 * 2**20 - 31) + b"}"
    assert len(body) == 8 * 2**20
    headers = {"content-type": "application/json"}
    assert served.request("POST", "/v1/stories", content=body, headers=headers).status_code == 201


def test_queries_that_a_route_does_not_take_are_refused(served: Served) -> None:
    story_id = served.post({"prompt": "A fox", "pages": 1}).json()["id"]
    assert_error(served.request("GET", f"/v1/stories/{story_id}?await=30"), 422, param="await")
    assert_error(served.request("GET", f"/v1/stories/{story_id}/pages/1.png?size=2"), 422, param="size")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/stories/story_none", 404),
        ("GET", "/v1/stories/..%2f..%2fetc", 404),
        ("GET", "/v1/stories/%00", 404),
        ("GET", "/v1/stories/story_none/pages/1.png", 404),
        ("GET", "/v1/stories/story_none/pages/x.png", 404),
        ("GET", "/v1/stories/story_none/pages/99999999999999999999999.png", 404),
        ("GET", "/nothing", 404),
        ("PUT", "/v1/stories", 405),
        ("DELETE", "/v1/stories/story_none", 404),
        ("PUT", "/v1/images/generations", 405),
    ],
)
def test_what_is_not_there_has_openais_error_shape(served: Served, method: str, path: str, status: int) -> None:
    assert_error(served.request(method, path), status)


# Pictures


def test_pictures_of_a_caption(served: Served) -> None:
    reply = served.post({"prompt": "A fox on a hill", "n": 3, "seed": 11}, "/v1/images/generations")
    assert reply.status_code == 200
    body = reply.json()
    assert body["x_native_size"] == "16x16"
    assert [item["x_seed"] for item in body["data"]] == [11, 12, 13]
    assert all(base64.b64decode(item["b64_json"]).startswith(b"\x89PNG") for item in body["data"])
    [request] = served.generator.requests  # the language model is asked once
    assert (request.mode, request.prompt, request.pages) == ("caption", ("A fox on a hill",), 1)
    assert [draw.settings for draw in served.decoder.requests] == [CONFIG.draw] * 3
    assert served.generator.num_closed == 1


@pytest.mark.parametrize("size", ["auto", "16x16", None])
def test_the_native_size_is_served(served: Served, size: str | None) -> None:
    reply = served.post({"prompt": "A fox", "size": size, "model": "storybook"}, "/v1/images/generations")
    assert reply.status_code == 200


def test_ignored_fields_are_named(served: Served) -> None:
    body = {"prompt": "A fox", "user": "u", "quality": "hd", "negative_prompt": "rain", "background": "transparent"}
    body |= {"style": None, "output_compression": 50, "partial_images": 2}
    reply = served.post(body, "/v1/images/generations").json()
    assert reply["x_ignored"] == [
        "background",
        "negative_prompt",
        "output_compression",
        "partial_images",
        "quality",
        "user",
    ]
    assert reply["background"] == "opaque"
    plain = {"prompt": "A fox", "background": "auto", "response_format": "b64_json", "output_format": "png"}
    assert "x_ignored" not in served.post(plain, "/v1/images/generations").json()


@pytest.mark.parametrize(
    ("fields", "draw"),
    [
        ({}, CONFIG.draw),
        ({"steps": 5}, DrawSettings(steps=5, guidance_scale=2.5)),
        ({"num_inference_steps": 5, "guidance_scale": 7}, DrawSettings(steps=5, guidance_scale=7)),
        ({"num_inference_steps": 5, "steps": 5, "guidance_scale": 0}, DrawSettings(steps=5, guidance_scale=1)),
        ({"extra_body": {"num_inference_steps": 6}}, DrawSettings(steps=6, guidance_scale=2.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/chat/completions"])
def test_steps_and_guidance_are_honoured_under_either_name(
    served: Served, path: str, fields: dict[str, object], draw: DrawSettings
) -> None:
    asked = {"prompt": "A fox"} if "images" in path else {"messages": [{"role": "user", "content": "A fox"}]}
    reply = served.post({**asked, **fields}, path)
    assert reply.status_code == 200, reply.text
    assert [request.settings for request in served.decoder.requests] == [draw]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"num_inference_steps": 5, "steps": 6}, "num_inference_steps", ("is 5 but steps is 6",)),
        ({"num_inference_steps": 101}, "num_inference_steps", ("101", "100")),
        ({"extra_body": {"guidance_scale": 21}}, "guidance_scale", ("21", "20")),
        ({"extra_body": {"colour": "red"}}, "colour", ('"red"',)),
        ({"extra_body": "steps=5"}, "extra_body", ("steps=5",)),
        ({"extra_body": {"extra_body": {}}}, None, ("another extra_body",)),
    ],
    ids=str,
)
def test_a_gateways_field_that_is_wrong_is_named_as_it_was_sent(
    served: Served, fields: dict[str, object], param: str | None, says: tuple[str, ...]
) -> None:
    assert_error(served.post({"prompt": "A fox", **fields}, "/v1/images/generations"), 400, param=param, says=says)


def test_a_field_that_is_null_asks_for_nothing(served: Served) -> None:
    body = {"prompt": "A fox", "guided_json": None, "extra_body": None, "size": None, "mask": None}
    reply = served.post(body, "/v1/images/generations")
    assert reply.status_code == 200 and "x_ignored" not in reply.json()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", ["256x256", None])
def test_a_picture_comes_in_the_format_that_was_asked_for(served: Served, kind: str, size: str | None) -> None:
    body = {"prompt": "A fox", "output_format": kind, "size": size, "seed": 3}
    reply = served.post(body, "/v1/images/generations").json()
    data = base64.b64decode(reply["data"][0]["b64_json"])
    assert (Image.open(io.BytesIO(data)).format or "").lower() == kind == reply["output_format"]
    url = served.post({**body, "response_format": "url"}, "/v1/images/generations").json()["data"][0]["url"]
    file = served.request("GET", url)
    assert url.endswith(f".{kind}")
    assert (file.content, file.headers["content-type"]) == (data, f"image/{kind}")


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_output_compression_is_a_files_quality(kind: str) -> None:
    body = CreateImages(prompt="A fox", output_format=kind, size="256x256")
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "PNG")
    qualities = (0, 50, 100, None)
    bodies = [body.model_copy(update={"output_compression": quality}) for quality in qualities]
    draw = dataclasses.replace(CONFIG.draw, width=256, height=256)
    sizes = [len(Output.of(one, CONFIG, draw).convert(file.getvalue())) for one in bodies]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


@pytest.mark.parametrize("size", ["1024x1024", "1792x1024", "100x333", "auto", None])
def test_a_picture_is_resampled_to_any_size(served: Served, size: str | None) -> None:
    reply = served.post({"prompt": "A fox", "size": size}, "/v1/images/generations").json()
    picture = Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))
    asked = size if size not in ("auto", None) else "16x16"
    assert f"{picture.width}x{picture.height}" == asked == reply["size"]
    assert reply["x_native_size"] == "16x16"
    assert reply.get("x_resampled", False) == (asked != "16x16")


def test_a_picture_is_there_under_its_url_for_an_hour(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "A fox", "response_format": "url", "n": 2, "seed": 3}
    reply = served.post(body, "/v1/images/generations").json()
    urls = [item["url"] for item in reply["data"]]
    plain = served.post({**body, "response_format": "b64_json"}, "/v1/images/generations").json()["data"]
    for url, item in zip(urls, plain, strict=True):
        picture = served.request("GET", url)
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        assert picture.content == base64.b64decode(item["b64_json"])
    for name in ("img_1.png", "..%2Fonce%2Fx.png", "x.png", f"{urls[0][11:-5]}g.png", f"{urls[0][11:-4]}.jpeg"):
        assert served.request("GET", f"/v1/images/{name}").status_code == 404
    served.store.delete_images(older_than_s=3600)
    assert served.request("GET", urls[0]).status_code == 200
    served.store.delete_images(older_than_s=-2)
    assert served.request("GET", urls[0]).status_code == 404


def test_urls_in_replies_are_where_the_application_is(tmp_path: Path) -> None:
    """Serve's `route_prefix`: a cluster serves several applications."""
    config = dataclasses.replace(CONFIG, examples=("A fox",))
    served = Served(tmp_path, config=config, example_pictures={1: b"RIFF"})

    async def main() -> None:
        app = under("/books", create_api(served.front), is_known=True)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/books")).headers["Location"].endswith("/books/")
            begun = await client.post("/books/v1/stories", json={"prompt": "A fox", "pages": 2, "wait": False})
            story = (await client.get(f"{begun.headers['Location']}?wait=30")).json()
            body = {"prompt": "A fox", "response_format": "url"}
            drawn = (await client.post("/books/v1/images/generations", json=body)).json()
            (model,) = (await client.get("/books/v1/models")).json()["data"]
            events = (await client.get(f"/books/v1/stories/{story['id']}/events")).text
            told = [data["url"] for _, name, data in read_events(events) if name == "image"]
            assert told == [page["image"]["url"] for page in story["pages"]]
            for url in (*told, drawn["data"][0]["url"], model["examples"][0]["picture"]):
                assert url.startswith("/books/v1/")
                assert (await client.get(url)).status_code == 200
            document = (await client.get("/books/openapi.json")).json()
            assert document["servers"] == [{"url": "/books"}]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "5000x1000"),
        ("size", "1000x15"),
        ("size", "0x0"),
        ("size", "big"),
        ("size", "64X64"),
        ("size", "-64x64"),
        ("size", "64x64x64"),
        ("response_format", "jpeg"),
        ("output_format", "gif"),
        ("background", "blue"),
        ("partial_images", 4),
        ("output_compression", 101),
        ("n", 0),
        ("n", 11),
        ("prompt", ""),
        ("prompt", None),
        ("seed", -1),
        ("colour", "red"),
    ],
)
def test_what_would_mislead_is_refused_by_name(served: Served, field: str, value: object) -> None:
    reply = served.post({"prompt": "A fox", field: value}, "/v1/images/generations")
    assert_error(reply, 400, param=field, says=(field, json.dumps(value)))
    assert not served.generator.requests


def test_an_unknown_model_is_not_found(served: Served) -> None:
    reply = served.post({"prompt": "A fox", "model": "dall-e-3"}, "/v1/images/generations")
    assert_error(reply, 404, param="model", says=("dall-e-3", "storybook"))
    assert reply.json()["error"]["code"] == "model_not_found"


def test_a_lost_connection_stops_the_pictures(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def use(client: httpx.AsyncClient) -> None:
        served.generator.gate.clear()
        asking = asyncio.create_task(client.post("/v1/images/generations", json={"prompt": "A fox"}))
        while not served.generator.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
        await asyncio.sleep(0.01)
        assert served.generator.num_closed == 1
        assert served.front.admission.num_running == 0

    served.run(use)


# Vokens out and in


def test_vokens_come_out_and_are_drawn_again_with_other_settings(served: Served) -> None:
    story = served.post({"prompt": "A fox", "pages": 2, "seed": 7}).json()
    reply = served.request("GET", f"/v1/stories/{story['id']}/pages/2/vokens")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/octet-stream")
    vokens = unpack(reply.content, page=2)
    assert vokens.fingerprint == FINGERPRINT
    body = {"vokens": base64.b64encode(reply.content).decode(), "seed": 5, "steps": 2, "guidance_scale": 1}
    again = served.post(body, "/v1/pictures")
    assert (again.status_code, again.headers["content-type"], again.headers["x-seed"]) == (200, "image/png", "5")
    assert again.content == make_png((5, 0, 1))
    asked = served.decoder.requests[-1]
    assert asked.settings == DrawSettings(steps=2, guidance_scale=1.0)
    assert (asked.vokens.hidden_VH == vokens.hidden_VH).all()
    assert_error(served.request("GET", f"/v1/stories/{story['id']}/pages/3/vokens"), 404)
    assert served.front.admission.num_running == 0


def test_drawing_vokens_again_is_no_work_of_the_generator(tmp_path: Path) -> None:
    class Watched(FakeDecoder):
        async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
            at_work.append([engine for engine, requests in served.front.admission._at_work.items() if requests])
            async for event in super().decode(request):
                yield event

    at_work: list[list[str]] = []
    served = Served(tmp_path, decoder=Watched())
    body = {"vokens": base64.b64encode(pack(VOKENS)).decode()}
    assert served.post(body, "/v1/pictures").status_code == 200
    assert at_work == [["decoder"]]
    assert not any(served.front.admission._at_work.values())


def test_vokens_in_base64_with_line_breaks_and_without_padding_are_read(served: Served) -> None:
    vokens = base64.encodebytes(pack(VOKENS)).decode().rstrip("=\n")
    assert "\n" in vokens
    assert served.post({"vokens": vokens, "seed": 5}, "/v1/pictures").status_code == 200


@pytest.mark.parametrize(
    ("vokens", "says"),
    [
        ("", "at least 1"),
        ("not base64!", "base64 is broken"),
        (base64.b64encode(b"no safetensors at all").decode(), "must be a safetensors file"),
        (base64.b64encode(pack(dataclasses.replace(VOKENS, fingerprint="cd" * 32))).decode(), "of another model"),
        (base64.b64encode(pack(dataclasses.replace(VOKENS, hidden_VH=np.zeros(3, np.float32)))).decode(), "(3,)"),
        (base64.b64encode(pack(dataclasses.replace(VOKENS, hidden_VH=np.zeros((8, 4))))).decode(), "float64"),
        ("A" * (2**20 + 1), "at most 1048576"),
    ],
)
def test_vokens_that_are_none_are_refused(served: Served, vokens: str, says: str) -> None:
    assert_error(served.post({"vokens": vokens}, "/v1/pictures"), 422, param="vokens", says=(says,))
    assert not served.decoder.requests


# Cancel


def test_a_cancelled_story_keeps_what_was_finished_and_its_reader_hears_of_it(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(delay_s=0.05))

    async def use(client: httpx.AsyncClient) -> None:
        streaming = asyncio.create_task(client.post("/v1/stories", json={"prompt": "A fox", "stream": True}))
        while not (stored := list((tmp_path / "stories").glob("story_*/pages/1/picture.png"))):
            await asyncio.sleep(0.01)
        path = f"/v1/stories/{stored[0].parts[-4]}"
        reply, second = await asyncio.gather(client.post(f"{path}/cancel"), client.post(f"{path}/cancel"))
        assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
        assert second.json() == reply.json()
        assert "image" in reply.json()["pages"][0]
        assert served.generator.num_closed == 1
        events = read_events((await streaming).text)
        assert events[-1][1] == "done"
        assert events[-1][2]["status"] == "cancelled"
        assert served.front.admission.num_running == 0
        assert (await client.post(f"{path}/cancel")).json() == (await client.get(path)).json()
        assert_error(await client.post("/v1/stories/story_none/cancel"), 404)

    served.run(use)


def test_cancel_passes_when_the_server_is_full(tmp_path: Path) -> None:
    served = Served(tmp_path, max_running=1)

    async def use(client: httpx.AsyncClient) -> None:
        served.generator.gate.clear()
        waiting = asyncio.create_task(client.post("/v1/stories", json={"prompt": "A fox"}))
        while not served.generator.requests:
            await asyncio.sleep(0.01)
        assert_error(await client.post("/v1/stories", json={"prompt": "A fox"}), 503)
        [folder] = (tmp_path / "stories").glob("story_*")
        assert (await client.post(f"/v1/stories/{folder.name}/cancel")).json()["status"] == "cancelled"
        assert (await waiting).json()["status"] == "cancelled"
        served.generator.gate.set()
        assert (await client.post("/v1/stories", json={"prompt": "A fox"})).status_code == 201

    served.run(use)


def test_a_progress_shows_the_picture_where_previews_are_asked_for(served: Served) -> None:
    body = {"prompt": "A fox", "pages": 1, "stream": True}
    for previews in (False, True):
        events = read_events(served.post({**body, "previews": previews}).text)
        shown = [data.get("preview") for _, name, data in events if name == "progress"]
        assert shown == [base64.b64encode(PREVIEW).decode() if previews else None] * 3


def test_a_client_is_known_by_its_key_and_else_by_its_address(served: Served) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer one"},
        {"Authorization": "Bearer two"},
        {"Authorization": "Bearer one"},
    ):
        served.request("POST", "/v1/stories", json={"prompt": "A fox", "pages": 1}, headers=headers)
    nobody, one, two, again = (request.key for request in served.generator.requests)
    assert len({nobody, one, two}) == 3
    assert one == again
    assert {request.key for request in served.decoder.requests} == {nobody, one, two}
    assert "one" not in one


# The rest


def test_models_shows_the_defaults_that_a_request_takes(served: Served) -> None:
    body = served.request("GET", "/v1/models").json()
    [model] = body["data"]
    assert body["object"] == "list"
    assert (model["id"], model["object"], model["image_size"]) == ("storybook", "model", "16x16")
    assert model["defaults"]["steps"] == 3
    assert set(model["defaults"]) <= set(CreateStory.model_fields)
    served.post({"prompt": "A fox", **model["defaults"], "pages": 1, "seed": 1})
    served.post({"prompt": "A fox", "pages": 1, "seed": 1})
    first, second = (dataclasses.replace(request, session="") for request in served.generator.requests)
    assert first == second


def test_a_model_is_found_by_its_name_with_what_it_is_for(served: Served) -> None:
    [model] = served.request("GET", "/v1/models").json()["data"]
    assert served.request("GET", "/v1/models/storybook").json() == model
    assert model["about"] == CONFIG.about
    assert model["examples"] == [{"prompt": prompt, "picture": None} for prompt in CONFIG.examples]
    assert_error(served.request("GET", "/v1/models/gpt-4"), 404, param="model", says=('"gpt-4"', "storybook"))
    assert_error(served.request("GET", "/v1/models/storybook/examples/1.webp"), 404, says=("example 1",))


def test_examples_have_their_pictures_whatever_the_model_is_called(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, name="me/my model?", examples=("A fox", "A bear"))
    served = Served(tmp_path, config=config, example_pictures={2: b"webp"})
    [model] = served.request("GET", "/v1/models").json()["data"]
    assert [one["prompt"] for one in model["examples"]] == ["A fox", "A bear"]
    assert model["examples"][0]["picture"] is None
    picture = served.request("GET", model["examples"][1]["picture"])
    assert (picture.headers["content-type"], picture.content) == ("image/webp", b"webp")
    assert served.request("GET", "/v1/models/me/my%20model%3F").json() == model
    for number in ("0", "1", "3"):
        assert_error(served.request("GET", f"/v1/models/me/my%20model%3F/examples/{number}.webp"), 404)


@pytest.mark.parametrize("path", ["/v1/stories/story_1/pages/{}.png", "/v1/models/storybook/examples/{}.webp"])
def test_a_number_of_5000_digits_is_refused_by_the_length_of_its_path(served: Served, path: str) -> None:
    reply = served.request("GET", path.format("9" * 5000))
    assert_error(reply, 414, says=(str(4998 + len(path)), "2000"))
    assert_error(served.request("GET", path.format("9" * 1900)), 404)


def test_health_readiness_docs_and_the_page(served: Served) -> None:
    assert served.request("GET", "/healthz").json() == {"status": "alive"}
    assert served.request("GET", "/readyz").json() == {"status": "ready"}
    assert served.request("GET", "/docs").status_code == 200
    assert "CreateStory" in served.request("GET", "/openapi.json").json()["components"]["schemas"]
    page = served.request("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", *re.findall(r'(?:href|src)="(/studio/[^"]+)"', page.text)):
        part = served.request("GET", path)
        assert part.status_code == 200
        assert "http://" not in part.text
        assert "https://" not in part.text
    assert_error(served.request("GET", "/studio/..%2fapi.py"), 404)
    assert_error(served.request("GET", "/studio/api.py"), 404)


def test_the_schedulers_are_those_that_the_decoder_knows() -> None:
    from minigpt5.model.decoders.noise import SAMPLERS  # loads torch

    annotation = CreateStory.model_fields["scheduler"].annotation
    names = {name for member in get_args(annotation) for name in get_args(member)}
    assert names == set(SAMPLERS)


HALF = "A \\ud83d fox"
"""As JSON has it: half of an emoji, which JavaScript sends where it has cut one."""


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/stories", f'{{"prompt": "{HALF}"}}', 422),
        ("/v1/stories", f'{{"prompt": [{{"type": "text", "text": "{HALF}"}}]}}', 422),
        ("/v1/stories", f'{{"prompt": "A fox", "colour": "{HALF}"}}', 422),
        ("/v1/stories", f'{{"prompt": "A fox", "{HALF}": 1}}', 422),
        ("/v1/images/generations", f'{{"prompt": "A fox", "output_format": "{HALF}"}}', 400),
        ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}', 400),
        (
            "/v1/chat/completions",
            f'{{"messages": [{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", '
            f'"arguments": {{"a": "{HALF}"}}}}}}]}}, {{"role": "user", "content": "x"}}]}}',
            400,
        ),
    ],
)
def test_half_of_a_character_is_refused_wherever_it_stands(served: Served, path: str, body: str, status: int) -> None:
    reply = served.request("POST", path, content=body, headers={"Content-Type": "application/json"})
    assert_error(reply, status, says=("half of a surrogate pair",))


def test_a_whole_character_of_two_halves_is_taken(served: Served) -> None:
    body = '{"prompt": "A \\ud83e\\udd8a", "pages": 1}'
    reply = served.request("POST", "/v1/stories", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 201 and reply.json()["prompt"] == "A \U0001f98a"
