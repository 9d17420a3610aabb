"""Pictures of any size over HTTP, by real engines of tiny size: stories, redraws, pictures, OpenAI's client, books."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from pypdf import PdfReader

from deployments.api.routes import create_api
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.types import DrawRequest, Picture
from tests.helpers.served import Served, assert_error, read_events
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_mapper
from tests.minigpt5.engine.test_generator import new_generator

CONFIG = tiny_config()  # draws 32 x 32, and sizes of multiples of 8 up to 64 x 48 pixels
STORY = {"prompt": "A fox", "pages": 1, "seed": 1, "steps": 2, "max_page_tokens": 8}


@pytest.fixture
def served(tmp_path: Path) -> Served:
    decoder = DiffusionDecoder(CONFIG, tiny_mapper(CONFIG), tiny_diffusion(CONFIG))
    return Served(tmp_path, generator=new_generator(), decoder=decoder, config=CONFIG)  # type: ignore[arg-type]


def size_of(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


@pytest.mark.parametrize(
    ("size", "drawn", "is_resampled"),
    [
        ({"width": 48, "height": 32}, (48, 32), False),
        ({"height": 64}, (32, 64), False),
        ({"width": 96, "height": 64}, (96, 64), True),
        ({"width": 50}, (50, 32), True),
        ({}, (32, 32), False),
    ],
)
def test_a_story_has_pictures_of_its_size(
    served: Served, size: dict[str, int], drawn: tuple[int, int], is_resampled: bool
) -> None:
    reply = served.post({**STORY, **size, "stream": True})
    events = {name: data for _, name, data in read_events(reply.text)}
    assert (events["image"]["width"], events["image"]["height"]) == drawn
    [page] = events["done"]["pages"]
    assert (page["image"]["width"], page["image"]["height"]) == drawn
    assert page["image"].get("resampled", False) == is_resampled
    assert size_of(served.request("GET", page["image"]["url"]).content) == drawn
    assert served.front.admission.load.work == {"generator": {}, "decoder": {}}, "all promised work is counted down"


def test_a_redraw_keeps_the_size_or_takes_another_and_variants_differ(served: Served) -> None:
    story = served.post({**STORY, "width": 48, "height": 32}).json()
    path = f"/v1/stories/{story['id']}/pages/1"
    again = served.post({"seed": 5}, f"{path}/redraw").json()
    assert (again["image"]["width"], again["image"]["height"]) == (48, 32)
    tall = served.post({"width": 32, "height": 104}, f"{path}/redraw").json()
    assert tall["image"].get("resampled") is True
    assert [(one["width"], one["height"]) for one in tall["variants"]] == [(48, 32), (48, 32), (32, 104)]
    assert size_of(served.request("GET", tall["variants"][2]["url"]).content) == (32, 104)
    back = served.request("PATCH", path, json={"variant": 0}).json()
    assert (back["image"]["width"], back["image"].get("resampled")) == (48, None)
    book = f"/v1/stories/{story['id']}"
    assert 'width="48" height="32"' in served.request("GET", f"{book}.html").text
    assert b"picture-1.png" in served.request("GET", f"{book}.epub").content
    [_, sheet] = PdfReader(io.BytesIO(served.request("GET", f"{book}.pdf").content)).pages
    assert [image.image.size for image in sheet.images if image.image] == [(48, 32)]
    assert served.post({"count": 1}, f"{book}/pages").json()["pages"][1]["image"]["width"] == 48


def test_fetched_vokens_are_drawn_in_any_size_and_a_header_says_what_is_resampled(served: Served) -> None:
    story = served.post(STORY).json()
    vokens = base64.b64encode(served.request("GET", f"/v1/stories/{story['id']}/pages/1/vokens").content).decode()
    for size, is_resampled in (((64, 48), None), ((100, 100), "true")):
        body = {"vokens": vokens, "seed": 1, "steps": 2, "width": size[0], "height": size[1]}
        reply = served.post(body, "/v1/pictures")
        assert (size_of(reply.content), reply.headers.get("x-resampled")) == (size, is_resampled)
    wrong = served.post({"vokens": vokens, "scheduler": "lcm"}, "/v1/pictures")
    assert_error(wrong, 422, param="scheduler", says=("'lcm'", "ddim, pndm"))
    assert_error(served.post({"vokens": vokens, "width": 31}, "/v1/pictures"), 422, param="width", says=("32 to 4096",))


def test_openais_client_gets_the_size_that_it_asks_for(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        for size, is_resampled in (("48x32", False), ("32x32", False), ("1536x1024", True), ("33x65", True)):
            settings: Any = {"prompt": "A fox", "size": size, "extra_body": {"seed": 7, "steps": 2}}
            reply = await client.images.generate(**settings)
            assert reply.data and reply.data[0].b64_json
            width, height = size_of(base64.b64decode(reply.data[0].b64_json))
            assert f"{width}x{height}" == size == reply.size
            assert (reply.x_native_size, getattr(reply, "x_resampled", False)) == ("32x32", is_resampled)  # type: ignore[attr-defined]
            *_, completed = [event async for event in await client.images.generate(**settings, stream=True)]
            assert completed.b64_json == reply.data[0].b64_json
            assert getattr(completed, "x_resampled", False) == is_resampled
        with pytest.raises(openai.BadRequestError, match="32 to 4096"):
            await client.images.generate(prompt="A fox", size="31x64")  # type: ignore[arg-type]

    async def main() -> None:
        transport = httpx.ASGITransport(create_api(served.front), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await use(openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0))

    asyncio.run(main())


def test_the_model_says_what_it_draws(served: Served) -> None:
    [model] = served.request("GET", "/v1/models").json()["data"]
    assert (model["image_size"], model["max_pixels"], model["size_multiple"]) == ("32x32", 64 * 48, 8)
    assert model["schedulers"] == ["ddim", "pndm", "dpm-solver++", "sde-dpm-solver++"]


def test_a_larger_picture_is_predicted_to_cost_more(served: Served) -> None:
    admission = served.front.admission
    draws = [CONFIG.draw_settings(sent) for sent in ({}, {"width": 64, "height": 48}, {"width": 96, "height": 96})]
    assert [admission.relative_pixels(draw) for draw in draws] == [1.0, 3.0, 1.0]


def test_the_picture_of_a_size_is_what_the_engine_draws(served: Served) -> None:
    story = served.post({**STORY, "width": 48, "height": 32}).json()
    vokens = served.store.load_vokens(story["id"], 1)
    draw = CONFIG.draw_settings({"steps": 2, "width": 48, "height": 32})
    decoder: Any = served.decoder
    [expected] = decoder.draw([DrawRequest(vokens=vokens, seed=story["pages"][0]["image"]["seed"], settings=draw)])
    assert isinstance(expected, Picture)
    difference = [
        abs(one - other)
        for one, other in zip(
            Image.open(io.BytesIO(expected.png)).tobytes(),
            Image.open(io.BytesIO(served.store.load_picture(story["id"], 1))).tobytes(),
            strict=True,
        )
    ]
    assert max(difference) <= 1
