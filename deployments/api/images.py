"""POST /v1/images/generations, in OpenAI's shape: pictures of a caption, as data or for an hour under a URL.

Ignored fields of an image request: user, quality, style, moderation.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import secrets
import time
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageOps
from pydantic import BaseModel, Field, field_validator

from deployments.api.drawing import draw
from deployments.api.errors import PNG, ApiError
from deployments.api.front import ClientOf, Front, FrontOf, check_texts
from deployments.api.replies import sign_urls
from deployments.schemas import MAX_SEED, Body, check_prompt_text, shown
from deployments.stories.admission import Reservation
from minigpt5.types import DrawRequest, Picture, StoryRequest, Vokens

MAX_PICTURES = 10
SIZES = ("256x256", "512x512", "1024x1024", "1536x1024", "1024x1536", "1792x1024", "1024x1792")
"""OpenAI's: pictures are drawn in the model's own size, and resampled."""

images = APIRouter()


class CreateImages(Body):
    """POST /v1/images/generations."""

    prompt: str
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Seed of the first picture; each further one has the next seed."""
    size: str | None = None
    model: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    background: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None

    @field_validator("prompt")
    @classmethod
    def has_content(cls, prompt: str) -> str:
        check_prompt_text([prompt])
        return prompt


class ImageItem(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    x_seed: int


class ImagesReply(BaseModel):
    created: int
    data: list[ImageItem]
    size: str
    output_format: Literal["png"]
    x_native_size: str


def check_model(asked: str | None, model: str) -> None:
    """Raises ApiError where another model than the one that is served is asked for."""
    if asked not in (None, model):
        message = f"model {shown(asked)} does not exist here; the model is {model}"
        raise ApiError(404, message, param="model", code="model_not_found")


def refuse_unserved(body: CreateImages, *, model: str, native_size: str) -> None:
    """Refuse what ignoring would mislead about. Raises ApiError."""
    check_model(body.model, model)
    served: dict[str, tuple[object, ...]] = {
        "size": ("auto", native_size, *SIZES),
        "response_format": ("b64_json", "url"),
        "output_format": ("png",),
        "output_compression": (100,),
        "background": ("auto", "opaque"),
        "stream": (False,),
        "partial_images": (0,),
    }
    for name, values in served.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            expected = " or ".join(map(shown, values))
            message = f"{name} is {shown(value)}, which this version does not serve: leave it out or send {expected}"
            raise ApiError(400, message, param=name, code="unsupported_value")


@images.post("/v1/images/generations", response_model=ImagesReply)
async def create_images(body: CreateImages, front: FrontOf, client: ClientOf) -> JSONResponse:
    """Pictures of a caption. A client that goes away stops the work."""
    native_size = f"{front.config.image_px}x{front.config.image_px}"
    refuse_unserved(body, model=front.config.name, native_size=native_size)
    check_texts(front, [body.prompt], "prompt")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    request = StoryRequest(
        prompt=(body.prompt,), pages=1, seed=seed, mode="caption", draw=front.config.default_draw, key=client
    )
    with front.admission.reserve(request, num_pictures=body.n or 1) as reservation:
        await front.engines.validate_request(request)
        vokens = await _write_vokens(front, request)
        reservation.observe(vokens)
        pictures = await _draw_all(front, reservation, request, vokens, seeds=[seed + k for k in range(body.n or 1)])
    size = read_size(body.size, native_size)
    pngs = await asyncio.gather(*[asyncio.to_thread(resample, picture.png, size) for picture in pictures])
    data: list[dict[str, object]] = []
    for picture, png in zip(pictures, pngs, strict=True):
        item = {"b64_json": base64.b64encode(png).decode()}
        if body.response_format == "url":
            name = await asyncio.to_thread(front.store.save_image, png)
            item = {"url": f"/v1/images/{name}.png"}
        data.append({**item, "x_seed": picture.seed})
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": sign_urls(front, data),
            "size": f"{size[0]}x{size[1]}",
            "output_format": "png",
            "x_native_size": native_size,
        }
    )


@images.get("/v1/images/{name}.png", response_class=Response, responses=PNG)
async def get_image(name: str, front: FrontOf) -> Response:
    """A picture whose URL was asked for; it is there for an hour."""
    return Response(await asyncio.to_thread(front.store.load_image, name), media_type="image/png")


def read_size(size: str | None, native_size: str) -> tuple[int, int]:
    width, _, height = (native_size if size in (None, "auto") else str(size)).partition("x")
    return int(width), int(height)


def resample(png: bytes, size: tuple[int, int]) -> bytes:
    """Resize a picture; if the shapes differ, crop it to its middle."""
    with Image.open(io.BytesIO(png)) as picture:
        if picture.size == size:
            return png
        resampled = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    resampled.save(file, "PNG")
    return file.getvalue()


async def _write_vokens(front: Front, request: StoryRequest) -> Vokens:
    async with contextlib.aclosing(front.engines.generate(request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Vokens):
                return event
    raise AssertionError("the generator ended without vokens")


async def _draw_all(
    front: Front, reservation: Reservation, request: StoryRequest, vokens: Vokens, *, seeds: list[int]
) -> list[Picture]:
    """All at once, so that they share the decoder's batch; the first failure ends the rest."""
    try:
        async with asyncio.TaskGroup() as drawing:
            requests = [DrawRequest(vokens=vokens, seed=seed, settings=request.draw, key=request.key) for seed in seeds]
            tasks = [drawing.create_task(draw(front, reservation, one)) for one in requests]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
