"""POST /v1/images/generations, in OpenAI's shape: pictures of a caption, as data, for an hour under a URL, or as a
stream with previews."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import re
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageOps
from pydantic import BaseModel, Field, field_validator

from deployments.api.drawing import draw
from deployments.api.errors import EVENTS, ApiError
from deployments.api.front import ClientOf, Front, FrontOf, check_texts
from deployments.api.openai_body import Ignored, OpenAIBody, check_model, ignored_fields, note
from deployments.api.replies import EventStream, public_urls
from deployments.engines.handover import draw_across_models, read_caption
from deployments.schemas import Style, check_prompt_text, shown
from deployments.sse import encode
from deployments.stories.admission import Reservation
from deployments.stories.store_threads import reading, writing
from minigpt5.config import ModelConfig
from minigpt5.types import NUM_PREVIEWS, DrawRequest, DrawSettings, Picture, Progress, StoryRequest, Usage, Vokens

MAX_PICTURES = 10
OPENAI_STYLES = ("vivid", "natural")
Kind = Literal["png", "jpeg", "webp"]
FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in get_args(Kind)},
        "description": "A picture",
    }
}

images = APIRouter()


class CreateImages(OpenAIBody):
    """POST /v1/images/generations. Each further picture of `n` has the next seed."""

    prompt: str
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
    size: str | None = None
    """"auto" or WIDTHxHEIGHT; a size that the model does not draw is resampled from its own."""
    response_format: Literal["b64_json", "url"] | None = None
    style: Style | None = None
    """One of the model's styles. OpenAI's own words, OPENAI_STYLES, are ignored."""
    output_format: Kind | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of a JPEG or WebP file; of a PNG it is ignored."""
    background: Literal["auto", "opaque", "transparent"] | None = None
    """Ignored where it is transparent: every picture is opaque."""
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=NUM_PREVIEWS)] | None = None
    """Previews before a streamed picture; ignored without `stream`."""

    # OpenAI's.
    complexity: Ignored = None
    frame_count: Ignored = None
    frame_duration_ms: Ignored = None
    quality: Ignored = None
    svg: Ignored = None

    # Other servers' and gateways'.
    enable_safety_checker: Ignored = None
    prompt_upsampling: Ignored = None
    safety_tolerance: Ignored = None
    watermark: Ignored = None

    @field_validator("prompt")
    @classmethod
    def has_content(cls, prompt: str) -> str:
        check_prompt_text([prompt])
        return prompt

    @property
    def ignored(self) -> list[str]:
        """The names of what nothing is done about."""
        found = ignored_fields(self)
        if self.style in OPENAI_STYLES:
            found.append("style")
        if self.background == "transparent":
            found.append("background")
        if self.output_compression is not None and self.output_format in (None, "png"):
            found.append("output_compression")
        if self.partial_images and not self.stream:
            found.append("partial_images")
        return sorted(found)

    def drawing(self, config: ModelConfig) -> DrawSettings:
        """How pictures are drawn. Raises InvalidRequest, or ApiError for the size."""
        asked: dict[str, int | str] = {**read_size(self.size, config)}
        if self.style is not None and self.style not in OPENAI_STYLES:
            asked["style"] = self.style
        return self.draw_settings(config, **asked)


class ImageItem(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    x_seed: int


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int = 0


class ImagesUsage(BaseModel):
    """What the language model read and wrote: the vokens of a caption are written once for all of its pictures."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ImagesUsage:
        read, written = usage.prompt_tokens, usage.completion_tokens
        details = InputTokens(text_tokens=read)
        return cls(input_tokens=read, input_tokens_details=details, output_tokens=written, total_tokens=read + written)


class ImagesReply(BaseModel):
    created: int
    data: list[ImageItem]
    size: str
    output_format: Kind
    background: Literal["opaque"] = "opaque"
    usage: ImagesUsage
    x_native_size: str
    """The model's own size."""
    x_resampled: bool = False
    """Whether pictures were drawn in the model's own size and then resampled to `size`. Left out where not."""
    x_ignored: list[str] = []
    """Names of the request's fields that nothing was done about. Left out where there are none."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """How pictures are sent."""

    native_size: str
    is_resampled: bool
    width: int
    height: int
    kind: Kind
    quality: int
    """Of a JPEG or WebP file, 0 to 100."""

    @classmethod
    def of(cls, body: CreateImages, config: ModelConfig, draw_settings: DrawSettings) -> Output:
        width, height = config.size_of(draw_settings)
        quality = 100 if body.output_compression is None else body.output_compression
        return cls(
            native_size=f"{config.drawn_px}x{config.drawn_px}",
            is_resampled=config.is_resampled(draw_settings),
            width=width,
            height=height,
            kind=body.output_format or "png",
            quality=quality,
        )

    @property
    def described(self) -> dict[str, str | bool]:
        """Fields of a reply."""
        size = f"{self.width}x{self.height}"
        return {
            "size": size,
            "output_format": self.kind,
            "background": "opaque",
            "x_native_size": self.native_size,
            **({"x_resampled": True} if self.is_resampled else {}),
        }

    def convert(self, data: bytes) -> bytes:
        """A picture or preview as it is sent. If the shapes differ, it is cropped to its middle."""
        size = (self.width, self.height)
        with Image.open(io.BytesIO(data)) as picture:
            if picture.size == size and picture.format == "PNG" and self.kind == "png":
                return data
            converted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        converted.save(file, self.kind, **({} if self.kind == "png" else {"quality": self.quality}))
        return file.getvalue()


@images.post("/v1/images/generations", response_model=ImagesReply, responses=EVENTS)
async def create_images(body: CreateImages, front: FrontOf, client: ClientOf) -> Response:
    """Pictures of a caption. A client that goes away stops the work."""
    check_model(body.model, front.config.name)
    draw_settings = body.drawing(front.config)
    if body.stream and body.response_format == "url":
        message = 'response_format is "url" but the events of a stream carry their pictures: leave it out'
        raise ApiError(400, message, param="response_format", code="unsupported_value")
    check_texts(front, [body.prompt], "prompt")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    request = StoryRequest(prompt=(body.prompt,), pages=1, seed=seed, mode="caption", draw=draw_settings, key=client)
    output = Output.of(body, front.config, draw_settings)
    if body.stream:
        return EventStream(stream_images(front, body, request, output), error_name="error")
    seeds = range(seed, seed + (body.n or 1))
    with front.admission.reserve(request, num_pictures=len(seeds)) as reservation:
        await front.engines.validate_request(request)
        vokens, usage = await _write_vokens(front, reservation, request)
        pictures = await _draw_all(front, reservation, request, vokens, seeds=seeds)
    files = await asyncio.gather(*[asyncio.to_thread(output.convert, picture.png) for picture in pictures])
    data: list[dict[str, object]] = []
    for picture, file in zip(pictures, files, strict=True):
        item = {"b64_json": base64.b64encode(file).decode()}
        if body.response_format == "url":
            name = await writing(front.store.save_image, file, kind=output.kind)
            item = {"url": f"/v1/images/{name}"}
        data.append({**item, "x_seed": picture.seed})
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": public_urls(front, data),
            **output.described,
            "usage": ImagesUsage.of(usage).model_dump(),
            **note(body.ignored),
        }
    )


def read_size(size: str | None, config: ModelConfig) -> dict[str, int]:
    """Width and height; nothing where the model's own size is asked for. Raises ApiError."""
    if size in (None, "auto"):
        return {}
    low, high = config.side_bounds
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", str(size), re.ASCII)
    width, height = map(int, found.groups()) if found else (0, 0)
    if not (low <= width <= high and low <= height <= high):
        message = (
            f'size is {shown(size)}, which is not served here: leave it out, or send "auto" or WIDTHxHEIGHT, each from '
            f"{low} to {high}"
        )
        raise ApiError(400, message, param="size", code="unsupported_value")
    return {"width": width, "height": height}


async def stream_images(front: Front, body: CreateImages, request: StoryRequest, output: Output) -> AsyncGenerator[str]:
    """OpenAI's events: previews, then the picture. Several pictures come one after another, for no event says which
    one it is of."""
    num_pictures = body.n or 1

    async def event(name: str, picture: bytes, **fields: Any) -> str:
        b64_json = base64.b64encode(await asyncio.to_thread(output.convert, picture)).decode()
        described = {"created_at": int(time.time()), **output.described, "quality": "auto"}
        return encode({"type": name, "b64_json": b64_json, **described, **fields}, name=name)

    with front.admission.reserve(request, num_pictures=num_pictures) as reservation:
        await front.engines.validate_request(request)
        vokens, usage = await _write_vokens(front, reservation, request)
        for seed in range(request.seed, request.seed + num_pictures):
            drawing = DrawRequest(
                vokens=vokens,
                seed=seed,
                settings=request.draw,
                key=request.key,
                num_previews=body.partial_images or 0,
            )
            num_shown, fields = 0, dict[str, Any]()
            again = functools.partial(_write_again, front, request)
            drawn = draw_across_models(front.engines, drawing, again)
            async with contextlib.aclosing(drawn) as events:
                async for told in events:
                    reservation.observe(told)
                    if isinstance(told, Progress) and told.preview:
                        fields = {"partial_image_index": num_shown}
                        yield await event("image_generation.partial_image", told.preview, **fields)
                        num_shown += 1
                    elif isinstance(told, Picture):
                        fields = {"usage": ImagesUsage.of(usage).model_dump(), "x_seed": seed, **note(body.ignored)}
                        yield await event("image_generation.completed", told.png, **fields)
            usage = Usage(prompt_tokens=0, completion_tokens=0)  # the first picture's event has counted it


@images.get("/v1/images/{name}", response_class=Response, responses=FILE)
async def get_image(name: str, front: FrontOf) -> Response:
    """A picture whose URL was asked for; it is there for an hour."""
    data = await reading(front.store.load_image, name)
    return Response(data, media_type=f"image/{name.rpartition('.')[2]}")


async def _write_vokens(front: Front, reservation: Reservation, request: StoryRequest) -> tuple[Vokens, Usage]:
    vokens = usage = None
    async with contextlib.aclosing(front.engines.generate(request)) as events:
        async for event in events:
            if isinstance(event, Vokens):
                vokens = event
                reservation.observe(event)
            elif isinstance(event, Usage):
                usage = event
    assert vokens and usage, "the generator ended without vokens"
    return vokens, usage


async def _write_again(front: Front, request: StoryRequest) -> Vokens:
    """The same vokens by the generator that is there now."""
    return await read_caption(front.engines, request.prompt_text, page=1, key=request.key)


async def _draw_all(
    front: Front, reservation: Reservation, request: StoryRequest, vokens: Vokens, *, seeds: range
) -> list[Picture]:
    """All at once, so that they share the decoder's batch; the first failure ends the rest."""
    try:
        async with asyncio.TaskGroup() as drawing:
            requests = [DrawRequest(vokens=vokens, seed=seed, settings=request.draw, key=request.key) for seed in seeds]
            again = functools.partial(_write_again, front, request)
            tasks = [
                drawing.create_task(draw(front, reservation, one, again, picture=number))
                for number, one in enumerate(requests)
            ]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
