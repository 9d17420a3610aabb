"""POST /v1/chat/completions: pictures in, text and pictures out, in OpenAI's shape.

A picture comes back as a data URL in `images`, with `offset`, its place in `content`. `modalities` of ["text",
"image"] asks for at least one picture and ["text"] for none; without it the model decides. A reply has one picture at
most unless `pages` says how many. A client that goes away stops the work.

Ignored, as nothing here depends on them: user, metadata, store, service_tier, safety_identifier, prompt_cache_key,
prompt_cache_retention, verbosity, reasoning_effort, parallel_tool_calls, prediction, and the `detail` of a picture.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from deployments.api.errors import EVENTS, ApiError
from deployments.api.front import ClientOf, Front, FrontOf, check_texts
from deployments.api.images import check_model
from deployments.api.replies import EventStream
from deployments.schemas import MAX_SEED, Body, check_prompt_text, decode_data_url, shown
from deployments.sse import encode
from minigpt5.config import ModelConfig
from minigpt5.errors import InvalidRequest
from minigpt5.story.stream import stream_story
from minigpt5.types import (
    MAX_PAGES,
    Picture,
    PictureFailed,
    PromptPart,
    SlotOpened,
    StoryEvent,
    StoryRequest,
    StoryStarted,
    TextDelta,
    Usage,
)

MAX_MESSAGES = 64
MAX_STOPS = 4
REFUSED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "audio": (),
    "web_search_options": (),
}
"""What ignoring would mislead about, with the values that ask for nothing."""

chat = APIRouter()


class ImageUrl(Body):
    url: str
    detail: str | None = None


class ContentPart(Body):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(Body):
    """What an answer had besides its text may come back with it, and is read where it is a picture."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    images: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    index: int
    message: dict[str, Any]
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    """Reply in OpenAI's format; a message may have `images` besides its `content`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class CreateChat(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    pages: Annotated[int, Field(ge=1, le=MAX_PAGES)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    audio: Any = None
    web_search_options: Any = None
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None


@chat.post("/v1/chat/completions", response_model=ChatReply, responses=EVENTS)
async def create_chat(body: CreateChat, front: FrontOf, client: ClientOf) -> Response:
    """Answer the last message, with pictures where they belong."""
    check_model(body.model, front.config.name)
    for name, values in REFUSED.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            message = f"{name} is {shown(value)}, which is not served here: leave it out"
            raise ApiError(400, message, param=name, code="unsupported_value")
    request = await asyncio.to_thread(to_reply_request, body, front.config, client=client)
    check_texts(front, request.prompt, "messages")
    reply = Reply(request, front.config)
    events = answer(front, request)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(stream_chunks(reply, events, with_usage))
    async with contextlib.aclosing(events):
        async for event in events:
            reply.add(event)
    return JSONResponse(reply.whole())


async def answer(front: Front, request: StoryRequest) -> AsyncGenerator[StoryEvent]:
    """A reply's events. A picture that fails fails the reply: it has no page to say so. Raises Overloaded or
    InvalidRequest before the first one."""
    with front.admission.reserve(request) as reservation:
        await front.engines.validate_request(request)
        events = stream_story(request, front.engines.generate, front.engines.decode)
        async with contextlib.aclosing(events):
            async for event in events:
                reservation.observe(event)
                if isinstance(event, PictureFailed):
                    raise ApiError(500, f"a picture could not be drawn: {event.error}", code="picture_failed")
                yield event


def to_reply_request(body: CreateChat, config: ModelConfig, *, client: str) -> StoryRequest:
    """Raises InvalidRequest."""
    sampling = config.sampling
    asked: dict[str, Any] = {
        "max_page_tokens": body.max_completion_tokens or body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    sampling = dataclasses.replace(sampling, **{name: value for name, value in asked.items() if value is not None})
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    pictures: Literal["auto", "none", "forced"] = "auto"
    if body.modalities:
        pictures = "forced" if "image" in body.modalities else "none"
    return StoryRequest(
        prompt=read_messages(body.messages),
        pages=body.pages,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        sampling=sampling,
        draw=config.default_draw,
        mode="reply",
        pictures=pictures,
        stop=tuple(stop),
        key=client,
    )


def read_messages(messages: list[Message]) -> tuple[PromptPart, ...]:
    """One prompt of all turns: the template has one question, so earlier turns stand in it as it writes them. Raises
    InvalidRequest."""
    parts: list[PromptPart] = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        read = read_message(message, field)
        if message.role == "assistant":
            read = ["###Assistant:", *read, "###Human:"]
        parts += read
    if messages[-1].role == "assistant":
        raise InvalidRequest("messages", "the last message is the assistant's own: ask something after it")
    texts = [part for part in parts if isinstance(part, str)]
    try:
        check_prompt_text(texts or [""], has_image=len(texts) < len(parts))
    except ValueError as error:
        raise InvalidRequest("messages", str(error)) from error
    return tuple(parts)


def read_message(message: Message, field: str) -> list[PromptPart]:
    content = message.content
    parts: list[PromptPart] = []
    if isinstance(content, str):
        parts.append(content)
    for number, part in enumerate(content if isinstance(content, list) else []):
        where = f"{field}.content[{number}]"
        if part.type == "text" and part.text is not None:
            parts.append(part.text)
        elif part.type == "image_url" and part.image_url is not None:
            parts.append(decode_data_url(part.image_url.url, field=f"{where}.image_url.url"))
        else:
            raise InvalidRequest(where, f"{where} is of type {part.type} but has no {part.type}")
    for number, image in enumerate(message.images or []):
        url = image["image_url"].get("url") if isinstance(image.get("image_url"), dict) else None
        parts.append(decode_data_url(str(url), field=f"{field}.images[{number}].image_url.url"))
    return parts


class Reply:
    """Events -> a completion, or its chunks."""

    def __init__(self, request: StoryRequest, config: ModelConfig) -> None:
        self.max_tokens, self.num_vokens = request.sampling.max_page_tokens, config.num_vokens
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": config.name}
        self.content = ""
        self.images: list[dict[str, Any]] = []
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._offsets: dict[int, int] = {}

    def add(self, event: StoryEvent) -> dict[str, Any] | None:
        """What is new, as a chunk's delta."""
        match event:
            case StoryStarted():
                return {"role": "assistant", "content": ""}
            case TextDelta():
                text = event.text if self.content else event.text.lstrip()
                self.content += text
                return {"content": text} if text else None
            case SlotOpened(page=page):
                self._offsets[page] = len(self.content)
            case Picture(page=page):  # it comes when it is drawn, maybe after text that follows it
                url = f"data:image/png;base64,{base64.b64encode(event.png).decode()}"
                image = {"type": "image_url", "image_url": {"url": url}, "offset": self._offsets[page]}
                self.images.append(image)
                return {"images": [image]}
            case Usage():
                self.usage = event
        return None

    @property
    def finish(self) -> str:
        num_written = self.usage.completion_tokens - self.num_vokens * len(self.images)
        return "length" if num_written >= self.max_tokens else "stop"

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.images:
            message["images"] = sorted(self.images, key=lambda image: image["offset"])
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.count()}

    def chunk(self, delta: dict[str, Any], *, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def count(self) -> dict[str, int]:
        read, written = self.usage.prompt_tokens, self.usage.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def stream_chunks(reply: Reply, events: AsyncGenerator[StoryEvent], with_usage: bool) -> AsyncGenerator[str]:
    async with contextlib.aclosing(events):
        async for event in events:
            if delta := reply.add(event):
                yield encode(reply.chunk(delta))
    yield encode(reply.chunk({}, finish=reply.finish))
    if with_usage:
        yield encode({**reply.chunk({}), "choices": [], "usage": reply.count()})
    yield "data: [DONE]\n\n"
