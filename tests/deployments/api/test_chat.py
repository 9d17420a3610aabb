"""OpenAI's own client against the front: chat with pictures in and out, images, models, errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.image_generate_params import ImageGenerateParamsBase
from PIL import Image

from deployments.api.chat import MAX_STOP_CHARACTERS, MAX_STOPS, CreateChat, Reply
from deployments.api.images import CreateImages
from deployments.api.routes import create_api
from minigpt5.errors import Blocked, EngineFull, EngineLost, InvalidRequest
from minigpt5.types import (
    DecoderEvent,
    DrawRequest,
    InputImage,
    Picture,
    Role,
    Sampling,
    SlotOpened,
    StoryEvent,
    StoryRequest,
    TextDelta,
    Usage,
)
from tests.helpers.fakes import FakeDecoder, FakeGenerator, make_png
from tests.helpers.served import CONFIG, Served, assert_error, data_url

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
        Role(name="system"),
        "You tell stories.",
        Role(name="user"),
        "Draw a fox",
        Role(name="assistant"),
        "Page 1 of 7.",
        "image",
        Role(name="user"),
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
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice"),
        ({"best_of": 3}, 400, "best_of"),
        ({"echo": True}, 400, "echo"),
        ({"logit_bias": {"50256": -100}}, 400, "logit_bias"),
        ({"guided_json": {"type": "object"}}, 400, "guided_json"),
        ({"web_search_options": {}}, 400, "web_search_options"),
        ({"stream_options": {"colour": "red"}}, 400, "stream_options.colour"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"colour": "red"}, 400, "colour"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, 400, "messages"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, 400, "stop"),
        ({"stop": "a" * (MAX_STOP_CHARACTERS + 1)}, 400, "stop"),
        ({"stop": ["a", "a" * (MAX_STOP_CHARACTERS + 1)]}, 400, "stop[1]"),
        ({"stop": [""]}, 400, "stop[0]"),
        ({"modalities": ["audio"]}, 400, "modalities[0]"),
        ({"repetition_penalty": 1e-310}, 400, "repetition_penalty"),
        ({"repetition_penalty": 1000}, 400, "repetition_penalty"),
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


def read(served: Served, *messages: dict[str, Any]) -> list[str]:
    """What the model reads of a history, a picture as "(picture)" and a role as "user:"; and that it answers."""
    reply = served.post({"messages": messages}, "/v1/chat/completions")
    assert reply.status_code == 200, reply.text
    prompt = served.generator.requests[-1].prompt
    return [f"{one.name}:" if isinstance(one, Role) else one if isinstance(one, str) else "(picture)" for one in prompt]


WEATHER = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bergen"}'}}
ASK, RESULT = {"role": "user", "content": "Is it raining?"}, {"role": "tool", "tool_call_id": "call_1"}
PICTURE = data_url(make_png())
HISTORIES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "content null with tool_calls, role tool": (
        [ASK, {"role": "assistant", "content": None, "tool_calls": [WEATHER]}, {**RESULT, "content": "It rains."}],
        ["Is it raining?", "assistant:", 'weather({"city": "Bergen"})', "user:", "It rains."],
    ),
    "several tool calls, a text, and what is asked then": (
        [
            ASK,
            {"role": "assistant", "content": "Let me look.", "tool_calls": [WEATHER, WEATHER]},
            {**RESULT, "content": [{"type": "text", "text": "It rains."}]},
            {**RESULT, "content": "4 degrees"},
            {"role": "user", "content": "Draw it"},
        ],
        [
            "Is it raining?",
            "assistant:",
            "Let me look.",
            'weather({"city": "Bergen"})',
            'weather({"city": "Bergen"})',
            "user:",
            "It rains.",
            "4 degrees",
            "Draw it",
        ],
    ),
    "arguments as an object": (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": {"at": 7}}}]}, ASK],
        ["Is it raining?", "assistant:", 'rain({"at": 7})', "user:", "Is it raining?"],
    ),
    "a custom tool": (
        [ASK, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "sh", "input": "ls"}}]}, ASK],
        ["Is it raining?", "assistant:", "sh(ls)", "user:", "Is it raining?"],
    ),
    "function_call and role function": (
        [
            ASK,
            {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": "{}"}},
            {"role": "function", "name": "rain", "content": "yes"},
        ],
        ["Is it raining?", "assistant:", "rain({})", "user:", "yes"],
    ),
    "developer and system": (
        [{"role": "system", "content": "Rhyme."}, {"role": "developer", "content": "Be short."}, ASK],
        ["system:", "Rhyme.", "Be short.", "user:", "Is it raining?"],
    ),
    "cache_control on a part": (
        [{"role": "user", "content": [{"type": "text", "text": "A fox", "cache_control": {"type": "ephemeral"}}]}],
        ["A fox"],
    ),
    "name, audio and annotations of a message": (
        [{**ASK, "name": "Ada"}, {"role": "assistant", "content": "No.", "audio": {"id": "a"}, "annotations": []}, ASK],
        ["Is it raining?", "assistant:", "No.", "user:", "Is it raining?"],
    ),
    "image_url as a string": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": PICTURE}]}],
        ["(picture)"],
    ),
    "input_text and input_image": (
        [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "This?"}, {"type": "input_image", "image_url": PICTURE}],
            }
        ],
        ["This?", "(picture)"],
    ),
    "a refusal, as a part and as a field": (
        [
            ASK,
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
            ASK,
            {"role": "assistant", "content": None, "refusal": "I will not."},
            ASK,
        ],
        [
            "Is it raining?",
            "assistant:",
            "I cannot.",
            "user:",
            "Is it raining?",
            "assistant:",
            "I will not.",
            "user:",
            "Is it raining?",
        ],
    ),
    "an assistant that says nothing": (
        [ASK, {"role": "assistant", "content": None}, {"role": "assistant", "content": " "}, ASK],
        ["Is it raining?", "Is it raining?"],
    ),
    "two answers one after the other": (
        [ASK, {"role": "assistant", "content": "No."}, {"role": "assistant", "content": "Yes."}, ASK],
        ["Is it raining?", "assistant:", "No.", "Yes.", "user:", "Is it raining?"],
    ),
    "the assistant first": (
        [{"role": "assistant", "content": "Hello!"}, ASK],
        ["assistant:", "Hello!", "user:", "Is it raining?"],
    ),
    "the assistant last": (
        [ASK, {"role": "assistant", "content": "No."}],
        ["Is it raining?", "assistant:", "No."],
    ),
    "two hundred messages": ([{"role": "user", "content": "a"}] * 200, ["a"] * 200),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_read_as_text(tmp_path: Path, name: str) -> None:
    messages, expected = HISTORIES[name]
    served = Served(tmp_path, generator=FakeGenerator(max_words=1000))
    assert read(served, *messages) == expected


@pytest.mark.parametrize("kind", ["input_audio", "file", "thinking"])
def test_a_part_without_a_text_is_passed_over_and_named(served: Served, kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"data": "AAAA", "format": "wav"}}]
    reply = served.post({"messages": [*MESSAGES, {"role": "user", "content": parts}]}, "/v1/chat/completions").json()
    assert reply["x_ignored"] == ["messages[1].content[1]"]
    assert served.generator.requests[0].prompt == ("Draw a fox", "What is this?")


def test_a_flood_of_parts_without_a_text_is_named_briefly(served: Served) -> None:
    parts = [{"type": "text", "text": "What is this?"}, *[{"type": "file"}] * 5000]
    reply = served.post({"messages": [{"role": "user", "content": parts}]}, "/v1/chat/completions").json()
    assert len(reply["x_ignored"]) == 33
    assert reply["x_ignored"][-2:] == ["messages[0].content[32]", "messages: 4968 more parts"]


def test_arguments_that_are_nested_as_deeply_as_json_may_be_are_read_or_refused(served: Served) -> None:
    for depth in (50, 500, 900, 970, 990, 5000):
        arguments = '{"a": ' * depth + "1" + "}" * depth
        call = f'{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", "arguments": {arguments}}}}}]}}'
        content = f'{{"messages": [{call}, {{"role": "user", "content": "A fox"}}]}}'
        headers = {"content-type": "application/json"}
        reply = served.request("POST", "/v1/chat/completions", content=content, headers=headers)
        assert reply.status_code in ((200,) if depth == 50 else (200, 400)), reply.text


def test_more_pictures_than_are_read_are_refused_before_they_are_decoded(served: Served) -> None:
    part = {"type": "image_url", "image_url": "data:,no picture"}
    body = {"messages": [{"role": "user", "content": [part] * 33}]}
    assert_error(served.post(body, "/v1/chat/completions"), 400, param="messages", says=("33 pictures", "at most 32"))


def test_what_gateways_add_is_ignored_by_name(served: Served) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        extra = {"top_k": 40, "min_p": 0.1, "chat_template_kwargs": {"enable_thinking": False}, "negative_prompt": ""}
        reply = await client.chat.completions.create(
            model="storybook",
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "weather"}}],
            tool_choice="auto",
            frequency_penalty=0.5,
            user="somebody",
            extra_body=extra,
        )
        names = ["chat_template_kwargs", "frequency_penalty", "min_p", "negative_prompt", "tools", "top_k", "user"]
        assert reply.x_ignored == names  # type: ignore[attr-defined]
        plain = await client.chat.completions.create(model="storybook", messages=MESSAGES, n=1)
        assert "x_ignored" not in plain.model_dump()

    ask(served, use)


def test_the_first_chunk_of_a_stream_names_what_was_ignored(served: Served) -> None:
    body = {"messages": MESSAGES, "stream": True, "top_k": 5, "extra_body": {"repetition_penalty": 1.2, "top_a": 0}}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    reply = served.post(body, "/v1/chat/completions")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    assert [chunk.get("x_ignored") for chunk in chunks] == [
        ["stream_options.continuous_usage_stats", "top_a", "top_k"],
        *[None] * (len(chunks) - 1),
    ]
    assert served.generator.requests[0].sampling.repetition_penalty == 1.2


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_above_the_window_is_clamped(served: Served, field: str) -> None:
    reply = served.post({"messages": MESSAGES, field: 128_000}, "/v1/chat/completions")
    assert reply.status_code == 200, reply.text
    assert served.generator.requests[0].sampling.max_page_tokens == CONFIG.context_tokens


@pytest.mark.parametrize(("num_written", "finish"), [(1470, "stop"), (1473, "length")])
def test_a_reply_that_fills_the_window_ends_for_its_length(num_written: int, finish: str) -> None:
    """A window of 1536 tokens has 8 for a picture; the prompt takes 55."""
    request = StoryRequest(
        prompt=("a",), pages=1, mode="reply", sampling=Sampling(max_page_tokens=CONFIG.context_tokens)
    )
    reply = Reply(request, CONFIG, ignored=[])
    reply.add(Usage(prompt_tokens=55, completion_tokens=num_written))
    assert reply.finish == finish


def test_the_texts_around_a_picture_are_parted() -> None:
    reply = Reply(StoryRequest(prompt=("a",), pages=3, mode="reply"), CONFIG, ignored=[])
    events: list[StoryEvent] = [
        TextDelta(page=1, text=" A"),
        TextDelta(page=1, text=" fox."),
        SlotOpened(page=1),
        TextDelta(page=2, text="It runs.\n"),
        SlotOpened(page=2),
        SlotOpened(page=3),
        TextDelta(page=4, text="The"),
        TextDelta(page=4, text=" end."),
    ]
    events += [Picture(page=page, png=b"", width=1, height=1, seed=1, denoise_steps=1) for page in (3, 1, 2)]
    deltas = [delta for event in events if (delta := reply.add(event))]
    [message] = [choice["message"] for choice in reply.whole()["choices"]]
    assert message["content"] == "A fox. It runs.\nThe end."
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert [message["content"][: image["offset"]] for image in message["images"]] == [
        "A fox.",
        *["A fox. It runs.\n"] * 2,
    ]


def test_several_pages_of_a_reply_are_parted_by_a_space(served: Served) -> None:
    body = {"messages": MESSAGES, "pages": 2, "seed": 7}
    message = served.post(body, "/v1/chat/completions").json()["choices"][0]["message"]
    assert message["content"] == "Page 1 of 7. Page 2 of 7."
    assert [image["offset"] for image in message["images"]] == [12, 25]


def test_every_field_of_openais_schema_is_one_of_ours() -> None:
    chat_fields = CompletionCreateParamsBase.__required_keys__ | CompletionCreateParamsBase.__optional_keys__
    assert len(chat_fields) > 30 and chat_fields - set(CreateChat.model_fields) == set()
    image_fields = ImageGenerateParamsBase.__required_keys__ | ImageGenerateParamsBase.__optional_keys__
    assert len(image_fields) > 15 and image_fields - set(CreateImages.model_fields) == set()


@pytest.mark.parametrize("num_partial", [0, 1, 3])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_streamed_picture_has_openais_events(served: Served, num_partial: int, kind: Any) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        settings: Any = {"prompt": "A fox", "size": "256x256", "output_format": kind, "extra_body": {"seed": 7}}
        whole = await client.images.generate(**settings)
        stream = await client.images.generate(
            **settings, stream=True, partial_images=num_partial, quality="high", background="opaque"
        )
        *partial, completed = [event async for event in stream]
        assert [type(event) for event in partial] == [ImageGenPartialImageEvent] * num_partial
        assert [event.partial_image_index for event in partial] == list(range(num_partial))  # type: ignore[union-attr]
        assert isinstance(completed, ImageGenCompletedEvent)
        assert whole.data and whole.usage and completed.b64_json == whole.data[0].b64_json
        assert completed.usage.model_dump() == whole.usage.model_dump(exclude={"output_tokens_details"})
        for event in (*partial, completed):
            ImageGenCompletedEvent.model_validate(
                {**event.model_dump(), "type": completed.type, "usage": completed.usage}
            )
            picture = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
            assert (picture.format, picture.size) == (kind.upper(), (256, 256))
            assert (event.size, event.output_format, event.background) == ("256x256", kind, "opaque")
            assert event.quality == "auto"
        assert completed.x_ignored == ["quality"]  # type: ignore[attr-defined]
        assert completed.x_seed == 7  # type: ignore[attr-defined]

    ask(served, use)
    assert served.front.admission.num_running == 0


class InStep(FakeDecoder):
    """Pictures that are asked for at once have all made their last step before the first one is sent."""

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        async for event in super().decode(request):
            if isinstance(event, Picture):
                await asyncio.sleep(0)
            yield event


def test_several_pictures_of_a_caption_are_all_the_work_that_was_promised(tmp_path: Path) -> None:
    served = Served(tmp_path, decoder=InStep())
    reply = served.post({"prompt": "A fox", "n": 3}, "/v1/images/generations")
    assert len(reply.json()["data"]) == 3
    assert len(served.front.admission._lateness) == 1, "how long it took is known, for nothing of it was left"


def test_streamed_pictures_come_one_after_another(served: Served) -> None:
    body = {"prompt": "A fox", "stream": True, "n": 2, "partial_images": 1, "seed": 7}
    reply = served.post(body, "/v1/images/generations")
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in reply.text.strip().split("\n\n") if not block.startswith(":")]
    events = [json.loads(block.partition("data: ")[2]) for block in blocks]
    assert [block.partition("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["type"].partition(".")[2] for event in events] == ["partial_image", "completed"] * 2
    assert [event.get("x_seed") for event in events] == [None, 7, None, 8]
    assert [event["usage"]["total_tokens"] for event in events[1::2]] == [17, 0]
    [written] = served.generator.requests  # the language model is asked once
    assert written.mode == "caption"


def test_a_streamed_picture_that_fails_says_so(tmp_path: Path) -> None:
    served = Served(tmp_path, decoder=FakeDecoder(fails_on_page=1))

    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.APIError, match="the decoder broke|internal error"):
            async for _ in await client.images.generate(prompt="A fox", stream=True):
                pass

    ask(served, use)
    assert served.front.admission.num_running == 0


def test_the_stream_of_a_picture_gives_no_url(served: Served) -> None:
    body = {"prompt": "A fox", "stream": True, "response_format": "url"}
    reply = served.post(body, "/v1/images/generations")
    assert_error(reply, 400, param="response_format", says=('"url"', "leave it out"))


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


class Failing(FakeDecoder):
    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        raise self.failure
        yield


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Blocked("the picture was stopped by the filter"), 400, "content_blocked"),
        (EngineLost("an engine's process died"), 503, "engine_lost"),
        (EngineFull("the decoder takes at most 512 requests at once: try again later"), 503, "overloaded"),
        (InvalidRequest("steps", "steps is 200 but must be from 1 to 100"), 400, "invalid_value"),
        (RuntimeError("the decoder broke"), 500, "picture_failed"),
    ],
)
def test_a_reply_fails_as_its_picture_does_alone(tmp_path: Path, failure: Exception, status: int, code: str) -> None:
    served = Served(tmp_path, decoder=Failing(failure))
    reply = served.post({"messages": MESSAGES}, "/v1/chat/completions")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], "Retry-After" in reply.headers) == (status, code, status == 503)
    assert str(failure) in error["message"]
    streamed = served.post({"messages": MESSAGES, "stream": True}, "/v1/chat/completions")
    assert json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"] == error
    if status < 500 or status == 503:
        alone = served.post({"prompt": "A fox"}, "/v1/images/generations")
        assert (alone.status_code, alone.json()["error"]) == (status, error)
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
