"""OpenAI's own client against the front: chat with pictures in and out, images, models, errors."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.api.chat import MAX_STOPS
from deployments.api.routes import create_api
from minigpt5.types import InputImage
from tests.helpers.fakes import FakeDecoder, FakeGenerator, make_png
from tests.helpers.served import Served, assert_error, data_url

MESSAGES: Any = [{"role": "user", "content": "Draw a fox"}]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


def ask(served: Served, use: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(create_api(served.front), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await use(openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0))

    asyncio.run(main())


def test_a_reply_has_its_text_and_its_picture_at_its_place(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        reply = await client.chat.completions.create(
            model="storybook", messages=MESSAGES, seed=7, extra_body={"modalities": ["text", "image"]}
        )
        [choice] = reply.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == (
            "assistant",
            "Page 1 of 7.",
            "stop",
        )
        [image] = choice.message.images  # type: ignore[attr-defined]
        assert image["offset"] == len("Page 1 of 7.")
        assert base64.b64decode(image["image_url"]["url"].partition(",")[2]).startswith(b"\x89PNG")
        assert reply.usage and reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert served.generator.requests[0].pictures == "forced"
        assert served.generator.requests[0].mode == "reply"

    ask(served, use)
    assert served.front.admission.num_running == 0


def test_a_streamed_reply_is_the_same(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(model="storybook", messages=MESSAGES, seed=7)
        stream = await client.chat.completions.create(
            model="storybook", messages=MESSAGES, seed=7, stream=True, stream_options={"include_usage": True}
        )
        content, images, finish, usage = "", [], None, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                content += choice.delta.content or ""
                images += getattr(choice.delta, "images", None) or []
                finish = choice.finish_reason or finish
        assert content == whole.choices[0].message.content
        assert images == whole.choices[0].message.images  # type: ignore[attr-defined]
        assert (finish, usage) == ("stop", whole.usage)

    ask(served, use)


def test_pictures_and_earlier_turns_are_read(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        first = await client.chat.completions.create(model="storybook", messages=MESSAGES, seed=7)
        picture = {"type": "image_url", "image_url": {"url": data_url(make_png()), "detail": "low"}}
        messages: Any = [
            {"role": "system", "content": "You tell stories."},
            *MESSAGES,
            first.choices[0].message.model_dump(),
            {"role": "user", "content": [{"type": "text", "text": "And this?"}, picture]},
        ]
        await client.chat.completions.create(model="storybook", messages=messages)

    ask(served, use)
    prompt = served.generator.requests[1].prompt
    kinds = ["image" if isinstance(part, InputImage) else part for part in prompt]
    assert kinds == [
        "You tell stories.",
        "Draw a fox",
        "###Assistant:",
        "Page 1 of 7.",
        "image",
        "###Human:",
        "And this?",
        "image",
    ]


def test_settings_reach_the_engine(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        await client.chat.completions.create(
            model="storybook",
            messages=MESSAGES,
            temperature=0.5,
            top_p=0.5,
            max_completion_tokens=9,
            stop=["End"],
            user="somebody",
            modalities=["text"],
            extra_body={"pages": 3},
        )

    ask(served, use)
    [request] = served.generator.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_page_tokens) == (0.5, 0.5, 9)
    assert (request.stop, request.pictures, request.pages) == (("End",), "none", 3)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"colour": "red"}, 400, "colour"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, 400, None),
        ({"modalities": ["audio"]}, 400, "modalities[0]"),
    ],
)
def test_what_would_mislead_is_refused(
    served: Served, fields: dict[str, object], status: int, param: str | None
) -> None:
    reply = served.post({"model": "storybook", "messages": MESSAGES, **fields}, "/v1/chat/completions")
    assert reply.status_code == status, reply.text
    if param:
        assert reply.json()["error"]["param"] == param
    assert not served.generator.requests


def test_a_picture_is_never_fetched(served: Served) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/secret.png"}}
    reply = served.post({"messages": [{"role": "user", "content": [part]}]}, "/v1/chat/completions")
    assert_error(reply, 400, param="messages[0].content[0].image_url.url", says=("data URL",))


def test_failures_are_told_in_either_way(tmp_path: Path) -> None:
    served = Served(tmp_path, decoder=FakeDecoder(fails_on_page=1))
    body = {"messages": MESSAGES}
    assert_error(served.post(body, "/v1/chat/completions"), 500, says=("the decoder broke",))
    streamed = served.post({**body, "stream": True}, "/v1/chat/completions")
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert "the decoder broke" in last["error"]["message"]
    assert served.front.admission.num_running == 0


def test_images_models_and_errors_come_through_the_client(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        images = await client.images.generate(prompt="A fox", n=2, response_format="b64_json")
        assert images.data and base64.b64decode(images.data[1].b64_json or "").startswith(b"\x89PNG")
        assert [model.id async for model in client.models.list()] == ["storybook"]
        with pytest.raises(openai.BadRequestError, match="empty"):
            await client.images.generate(prompt="")
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            await client.images.generate(prompt="A fox", model="dall-e-3")

    ask(served, use)


def test_a_full_server_is_told_to_the_client(tmp_path: Path) -> None:
    served = Served(tmp_path, generator=FakeGenerator(), max_running=1)

    async def use(client: openai.AsyncOpenAI) -> None:
        served.generator.gate.clear()
        first = asyncio.create_task(client.chat.completions.create(model="storybook", messages=MESSAGES))
        while not served.generator.requests:
            await asyncio.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="limit is 1") as refusal:
            await client.chat.completions.create(model="storybook", messages=MESSAGES)
        assert refusal.value.status_code == 503
        served.generator.gate.set()
        assert (await first).choices

    ask(served, use)
