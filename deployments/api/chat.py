"""POST /v1/chat/completions: pictures in, text and pictures out, in OpenAI's shape.

A picture comes back as a data URL in `images`, with `offset`, its place in `content`. `modalities` of ["text",
"image"] asks for at least one picture and ["text"] for none; without it the model decides. A reply has one picture at
most unless `pages` says how many. A client that goes away stops the work.
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
from pydantic import BaseModel, Discriminator, Field, Tag

from deployments.api.errors import EVENTS, ApiError
from deployments.api.front import ClientOf, Front, FrontOf, check_texts
from deployments.api.messages import MAX_MESSAGES, Message, read_messages
from deployments.api.openai_body import Ignored, OpenAIBody, check_model, ignored_fields, note, refuse_unserved
from deployments.api.replies import EventStream
from deployments.engines.handover import draw_across_models, read_caption
from deployments.schemas import Body
from deployments.sse import encode
from minigpt5.config import ModelConfig
from minigpt5.errors import MiniGPT5Error
from minigpt5.story.stream import stream_story
from minigpt5.types import (
    MAX_PENALTY,
    MAX_REPLY_PICTURES,
    MIN_PENALTY,
    DecoderEvent,
    DrawRequest,
    Picture,
    PictureFailed,
    SlotOpened,
    StoryEvent,
    StoryRequest,
    StoryStarted,
    TextDelta,
    Usage,
    Vokens,
)

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
"""Stop strings are looked for at every token, in the engine's thread."""
SERVED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "audio": (),
    "web_search_options": (),
}
"""Fields whose effect a client would miss, with the values that ask for nothing."""

chat = APIRouter()

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    Annotated[Stop, Tag("as-string")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("as-strings")],
    Discriminator(lambda stop: "as-strings" if isinstance(stop, list) else "as-string"),
]


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
    """Reply in OpenAI's format; a message may have `images` besides its `content`, and the reply `x_ignored`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    x_ignored: list[str] = []
    """Names of the request's fields and parts that nothing was done about. Left out where there are none."""


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Ignored = None
    continuous_usage_stats: Ignored = None


class CreateChat(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    pages: Annotated[int, Field(ge=1, le=MAX_REPLY_PICTURES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Clamped to what the context window has left."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_PENALTY, le=MAX_PENALTY)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Served for the values in SERVED.
    n: int | None = None
    best_of: int | None = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None
    use_beam_search: bool | None = None
    audio: Any = None
    web_search_options: Any = None

    # OpenAI's.
    frequency_penalty: Ignored = None
    functions: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    presence_penalty: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    tools: Ignored = None
    verbosity: Ignored = None

    # Other servers' and gateways'.
    add_generation_prompt: Ignored = None
    add_special_tokens: Ignored = None
    cache_salt: Ignored = None
    chat_template: Ignored = None
    chat_template_kwargs: Ignored = None
    enable_thinking: Ignored = None
    include_reasoning: Ignored = None
    include_stop_str_in_output: Ignored = None
    keep_alive: Ignored = None
    length_penalty: Ignored = None
    min_p: Ignored = None
    min_tokens: Ignored = None
    mm_processor_kwargs: Ignored = None
    models: Ignored = None
    plugins: Ignored = None
    priority: Ignored = None
    provider: Ignored = None
    reasoning: Ignored = None
    request_id: Ignored = None
    route: Ignored = None
    safe_prompt: Ignored = None
    session_id: Ignored = None
    skip_special_tokens: Ignored = None
    spaces_between_special_tokens: Ignored = None
    stop_token_ids: Ignored = None
    thinking: Ignored = None
    top_a: Ignored = None
    top_k: Ignored = None
    transforms: Ignored = None
    truncate_prompt_tokens: Ignored = None
    typical_p: Ignored = None
    usage: Ignored = None


@chat.post("/v1/chat/completions", response_model=ChatReply, responses=EVENTS)
async def create_chat(body: CreateChat, front: FrontOf, client: ClientOf) -> Response:
    """Answer the last message, with pictures where they belong."""
    check_model(body.model, front.config.name)
    refuse_unserved(body, SERVED)
    request, unread = await asyncio.to_thread(to_reply_request, body, front.config, client=client)
    check_texts(front, request.prompt, "messages")
    reply = Reply(request, front.config, ignored=[*ignored_fields(body), *unread])
    events = answer(front, request)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(stream_chunks(reply, events, with_usage))
    async with contextlib.aclosing(events):
        async for event in events:
            reply.add(event)
    return JSONResponse(reply.whole())


async def answer(front: Front, request: StoryRequest) -> AsyncGenerator[StoryEvent]:
    """A reply's events. A picture that fails fails the reply, which has no page to say so, and so does a text that the
    filter stops. Raises Overloaded or InvalidRequest before the first one, Blocked or what an engine raises later."""
    with front.admission.reserve(request) as reservation:
        await front.engines.validate_request(request)
        texts: dict[int, str] = {}
        failures: dict[int, Exception] = {}
        """What a story would only have as words on its page."""

        async def decode(drawing: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
            page = drawing.vokens.page

            async def read_again() -> Vokens:  # a reply cannot be read in its place: each page by itself
                text = texts.get(page, "").strip() or request.prompt_text
                return await read_caption(front.engines, text, page=page, key=request.key)

            try:
                async with contextlib.aclosing(draw_across_models(front.engines, drawing, read_again)) as events:
                    async for event in events:
                        yield event
            except Exception as failure:
                failures[page] = failure
                raise

        events = stream_story(request, front.engines.generate, decode)
        async with contextlib.aclosing(events):
            async for event in events:
                reservation.observe(event)
                if isinstance(event, TextDelta):
                    texts[event.page] = texts.get(event.page, "") + event.text
                if isinstance(event, SlotOpened):
                    check_texts(front, [texts.get(event.page)], "the reply")
                if isinstance(event, PictureFailed):
                    if isinstance(failure := failures[event.page], MiniGPT5Error):
                        raise failure
                    raise ApiError(500, f"a picture could not be drawn: {event.error}", code="picture_failed")
                yield event
        check_texts(front, texts.values(), "the reply")


def to_reply_request(body: CreateChat, config: ModelConfig, *, client: str) -> tuple[StoryRequest, list[str]]:
    """The request, and the places of the messages' parts that were passed over. Raises InvalidRequest."""
    prompt, unread = read_messages(body.messages)
    max_tokens = body.max_completion_tokens or body.max_tokens
    asked: dict[str, Any] = {
        "max_page_tokens": max_tokens and min(max_tokens, config.context_tokens),  # the engine knows what is left of it
        "temperature": body.temperature,
        "top_p": body.top_p,
        "repetition_penalty": body.repetition_penalty,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    pictures: Literal["auto", "none", "forced"] = "auto"
    if body.modalities:
        pictures = "forced" if "image" in body.modalities else "none"
    request = StoryRequest(
        prompt=prompt,
        pages=body.pages,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        sampling=dataclasses.replace(config.sampling, **asked),
        draw=body.draw_settings(config),
        mode="reply",
        pictures=pictures,
        stop=tuple(stop),
        key=client,
    )
    return request, unread


class Reply:
    """Events -> a completion, or its chunks."""

    def __init__(self, request: StoryRequest, config: ModelConfig, *, ignored: list[str]) -> None:
        self.max_tokens, self.num_vokens = request.sampling.max_page_tokens, config.num_vokens
        self.room = config.context_tokens - request.pages * config.num_vokens
        """Tokens of the prompt and the text together."""
        self.note = note(ignored)
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": config.name}
        self.content = ""
        self.images: list[dict[str, Any]] = []
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._offsets: dict[int, int] = {}
        self._page = 1
        """Page of the last text."""

    def add(self, event: StoryEvent) -> dict[str, Any] | None:
        """What is new, as a chunk's delta."""
        match event:
            case StoryStarted():
                return {"role": "assistant", "content": ""}
            case TextDelta(page=page, text=text):
                if not self.content:
                    text = text.lstrip()
                elif page != self._page and not self.content[-1].isspace():
                    text = f" {text}"  # a page's text comes without its first space
                self.content, self._page = self.content + text, page
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
        return "length" if num_written >= min(self.max_tokens, self.room - self.usage.prompt_tokens) else "stop"

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.images:
            message["images"] = sorted(self.images, key=lambda image: image["offset"])
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.count(), **self.note}

    def chunk(self, delta: dict[str, Any], *, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def count(self) -> dict[str, int]:
        read, written = self.usage.prompt_tokens, self.usage.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def stream_chunks(reply: Reply, events: AsyncGenerator[StoryEvent], with_usage: bool) -> AsyncGenerator[str]:
    ignored = reply.note
    async with contextlib.aclosing(events):
        async for event in events:
            if delta := reply.add(event):
                yield encode({**reply.chunk(delta), **ignored})
                ignored = {}
    yield encode(reply.chunk({}, finish=reply.finish))
    if with_usage:
        yield encode({**reply.chunk({}), "choices": [], "usage": reply.count()})
    yield "data: [DONE]\n\n"
