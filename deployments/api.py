"""The HTTP front: routes over the registry, the store and the engines. Loads no torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.client import NotReady, ServeEngines
from deployments.errors import RETRY_AFTER_S, ApiError, BodyLimit, error_response, install_error_handlers
from deployments.front import ClientOf, Front, FrontOf, build_front
from deployments.openai_api import images
from deployments.registry import RunningStory
from deployments.schemas import (
    CreatePicture,
    CreateStory,
    StoryReply,
    shown,
    story_reply,
    to_draw_request,
    to_story_request,
)
from minigpt5.errors import FingerprintMismatch, InvalidRequest
from minigpt5.model_folder import load_config
from minigpt5.store import StoryStore
from minigpt5.types import MAX_PAGES, Picture, StoryRequest
from minigpt5.voken_file import pack

KEEP_ALIVE_S = 15.0
STUDIO = Path(__file__).parent / "studio" / "index.html"


def refuse_unknown_query(request: Request) -> None:
    """No route here takes a query yet: one that asks for something would otherwise be ignored."""
    for name, value in request.query_params.items():
        raise ApiError(422, f"query parameter {name[:40]} (value {shown(value)}) is not served here", param=name[:40])


def refuse_idempotency_key(request: Request) -> None:
    if "Idempotency-Key" in request.headers:
        message = "header Idempotency-Key is not served by this version: leave it out"
        raise ApiError(422, message, param="Idempotency-Key", code="unknown_field")


stories = APIRouter(dependencies=[Depends(refuse_unknown_query)])
operations = APIRouter()


@stories.post("/v1/stories", status_code=201, dependencies=[Depends(refuse_idempotency_key)])
async def create_story(body: CreateStory, front: FrontOf, client: ClientOf) -> Response:
    """Write and draw a story: as a whole, or with `stream` as server-sent events."""
    request = await asyncio.to_thread(to_story_request, body, front.config, client=client)
    story = await front.registry.start(request)
    if body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(story), media_type="text/event-stream", headers=headers)
    state = await story.finish()
    path = f"/v1/stories/{story.id}"
    if state.status == "failed":
        message = f"{story.id} failed: {state.error}; what was finished is at {path}"
        return error_response(500, message, code="story_failed", headers={"Location": path})
    reply = story_reply(state).model_dump(exclude_none=True)
    return JSONResponse(reply, 201, headers={"Location": path})


@stories.get("/v1/stories/{story_id}", response_model=StoryReply, response_model_exclude_none=True)
async def get_story(story_id: str, front: FrontOf) -> StoryReply:
    """A story as far as it is."""
    return story_reply(await asyncio.to_thread(front.store.load, story_id))


@stories.get("/v1/stories/{story_id}/pages/{page:int}.png")
async def get_picture(story_id: str, page: int, front: FrontOf) -> Response:
    png = await asyncio.to_thread(front.store.load_picture, story_id, page)
    return Response(png, media_type="image/png")


@stories.get("/v1/stories/{story_id}/pages/{page:int}/vokens")
async def get_vokens(story_id: str, page: int, front: FrontOf) -> Response:
    """What a page's picture was drawn from, as safetensors: it can be drawn again with other settings."""
    vokens = await asyncio.to_thread(front.store.load_vokens, story_id, page)
    return Response(pack(vokens), media_type="application/octet-stream")


@stories.post("/v1/pictures")
async def draw_vokens(body: CreatePicture, front: FrontOf, client: ClientOf) -> Response:
    """Vokens -> a PNG. A client that goes away stops the work."""
    request = to_draw_request(body, front.config, client=client)
    if request.vokens.fingerprint != front.config.fingerprint:
        message = "vokens are of another model than the one that is served: only its own decoder may draw them"
        raise InvalidRequest("vokens", message)
    # What admission is told of: one picture, and no text.
    story = StoryRequest(prompt=("",), pages=1, mode="caption", draw=request.settings, key=client)
    with front.admission.enter(story) as place:
        async with contextlib.aclosing(front.engines.decode(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Picture):
                    return Response(event.png, media_type="image/png", headers={"X-Seed": str(event.seed)})
                place.see(event)
    raise AssertionError("the decoder ended without a picture")


@stories.post("/v1/stories/{story_id}/cancel", response_model=StoryReply, response_model_exclude_none=True)
async def cancel_story(story_id: str, front: FrontOf) -> StoryReply:
    """Stop a story's work; what was finished stays. A story that has ended stays as it is."""
    await front.registry.cancel(story_id)
    return story_reply(await asyncio.to_thread(front.store.load, story_id))


@stories.get("/v1/models")
async def list_models(front: FrontOf) -> JSONResponse:
    """The model that is served, and the defaults of a request's optional fields."""
    config = front.config
    model = {
        "id": config.name,
        "object": "model",
        "created": 0,
        "owned_by": "minigpt5",
        "fingerprint": config.fingerprint,
        "image_size": f"{config.image_px}x{config.image_px}",
        "context_tokens": config.context_tokens,
        "max_pages": MAX_PAGES,
        "defaults": {
            "pages": CreateStory.model_fields["pages"].default,
            "steps": config.draw.steps,
            "guidance_scale": config.draw.guidance_scale,
            "scheduler": config.draw.scheduler,
            "temperature": config.sampling.temperature,
            "top_p": config.sampling.top_p,
            "min_page_tokens": config.sampling.min_page_tokens,
            "max_page_tokens": config.sampling.max_page_tokens,
        },
    }
    return JSONResponse({"object": "list", "data": [model]})


@operations.get("/healthz")
async def is_alive() -> JSONResponse:
    """This process answers."""
    return JSONResponse({"status": "alive"})


@operations.get("/readyz")
async def is_ready(front: FrontOf) -> Response:
    """200 when a request would be accepted."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    if front.admission.is_full:
        headers = {"Retry-After": str(front.admission.retry_after_s)}
        return error_response(503, "all places are taken", code="overloaded", headers=headers)
    try:
        await front.engines.check_ready()
    except (NotReady, FingerprintMismatch) as failure:
        return error_response(503, str(failure), code="not_ready", headers=headers)
    return JSONResponse({"status": "ready"})


@operations.get("/", include_in_schema=False)
async def open_studio() -> FileResponse:
    return FileResponse(STUDIO, media_type="text/html")


async def _stream(story: RunningStory) -> AsyncIterator[str]:
    """A story's events as text, with a comment now and then so that nothing on the way closes a quiet line."""
    events = story.follow()
    arriving = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({arriving}, timeout=KEEP_ALIVE_S)
            if not arriving.done():
                yield ": still here\n\n"
                continue
            event = arriving.result()
            if event is None:
                return
            yield event.encode()
            arriving = asyncio.ensure_future(anext(events, None))
    finally:
        arriving.cancel()


def create_api(front: Front) -> FastAPI:
    """The ASGI application; in Serve and in tests alike."""
    api = FastAPI(title="MiniGPT-5", description="Illustrated stories: text and pictures in one go.")
    api.state.front = front
    api.add_middleware(BodyLimit)
    install_error_handlers(api)
    for router in (stories, images, operations):
        api.include_router(router)
    return api


@serve.ingress()
class Ingress:
    """The front as a Serve deployment."""

    def __init__(
        self,
        generator: DeploymentHandle,
        decoder: DeploymentHandle,
        model: str,
        storage: str,
        max_wait_s: float,
        max_running: int,
    ) -> None:
        engines, store = ServeEngines(generator, decoder), StoryStore(storage)
        self.front = build_front(load_config(model), engines, store, max_wait_s=max_wait_s, max_running=max_running)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self.front)
