"""The HTTP front: routes over the running stories, the store and the engines. Loads no torch."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.api.access_log import AccessLog
from deployments.api.chat import chat
from deployments.api.drawing import draw_alone
from deployments.api.errors import (
    PNG,
    REFUSALS,
    RETRY_AFTER_S,
    ApiError,
    BodyLimit,
    document,
    error_response,
    install_error_handlers,
)
from deployments.api.exports import exports
from deployments.api.front import (
    ClientOf,
    Front,
    FrontOf,
    build_front,
    check_owner,
    check_texts,
    note_story,
    refuse_unknown_query,
)
from deployments.api.images import images
from deployments.api.models import models
from deployments.api.pages import MAX_VARIANTS, pages
from deployments.api.replies import BEGUN, RESUMED, EventStream, answer, follow, reply
from deployments.auth import KeyGuard, check_host, session_cookie, watch_keys
from deployments.engines.handles import NotReady, ServeEngines
from deployments.observability.story_context import add_ids_to_log
from deployments.proxy import warn_where_unguarded
from deployments.schemas import (
    CreatePicture,
    CreateStory,
    Login,
    StatusReply,
    StoryList,
    StoryReply,
    shown,
    story_reply,
    to_draw_request,
    to_story_request,
)
from deployments.stories.events import Position, has_ended_for
from deployments.stories.idempotency import start_once
from deployments.stories.retention import keep_within
from deployments.stories.serve_ledger import ServeLedger
from deployments.stories.store_threads import reading, writing
from minigpt5.errors import FingerprintMismatch, InvalidRequest, StoryNotFound
from minigpt5.model.folder import load_example_pictures
from minigpt5.model.folder_config import load_config
from minigpt5.model.locate import locate
from minigpt5.story.safety import TextFilter
from minigpt5.story.store import StoryStore
from minigpt5.story.voken_file import pack

MAX_LISTED = 100
MAX_WAIT_S = 120.0
"""A client that wants to wait for longer asks again: what is on the way may close a line that is quiet."""
STUDIO = Path(__file__).parents[1] / "studio"
STUDIO_FILES = {"studio.css": "text/css", "studio.js": "text/javascript"}
STUDIO_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"


stories = APIRouter(dependencies=[Depends(note_story), Depends(refuse_unknown_query), Depends(check_owner)])
operations = APIRouter()


@stories.post("/v1/stories", status_code=201, response_model=StoryReply, responses=BEGUN)
async def create_story(
    body: CreateStory,
    front: FrontOf,
    client: ClientOf,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Write and draw a story: as a whole, with `stream` as server-sent events, or without `wait` in the background.
    The same `Idempotency-Key` with the same body is the same story, however often it is sent."""
    request = await asyncio.to_thread(to_story_request, body, front.config, client=client)
    check_texts(front, request.prompt, "prompt")

    async def begin() -> str:
        if idempotency_key is None:
            return (await front.runner.start(request)).id
        asked = body.model_dump_json(exclude_defaults=True)  # the same for a version that has more fields
        digest = hashlib.sha256(asked.encode()).hexdigest()
        return await start_once(front.leases, front.runner, request, key=idempotency_key, digest=digest)

    return await answer(front, begin, stream=body.stream, wait=body.wait)


@stories.get("/v1/stories", response_model=StoryList, response_model_exclude_none=True)
async def list_stories(
    front: FrontOf,
    client: ClientOf,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Stories, newest first; where there are keys, those of the own one."""

    def load() -> StoryList:
        found: list[StoryReply] = []
        for story_id in front.store.list_ids(owner=client if front.keys else None, after=after):
            with contextlib.suppress(StoryNotFound):  # deleted meanwhile
                state = front.store.load(story_id)
                if front.keys is None or state.owner == client:
                    if len(found) == limit:
                        return StoryList(data=found, has_more=True)
                    found.append(story_reply(state))
        return StoryList(data=found, has_more=False)

    return reply(front, await reading(load))


@stories.get("/v1/stories/{story_id}", response_model=StoryReply, response_model_exclude_none=True)
async def get_story(story_id: str, front: FrontOf, wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 0) -> Response:
    """A story as far as it is; with `wait`, after its end or so many seconds."""
    if wait:
        await front.relay.wait(story_id, wait)
    return reply(front, story_reply(await reading(front.store.load, story_id)))


@stories.get("/v1/stories/{story_id}/events", response_class=Response, responses=RESUMED)
async def get_events(
    story_id: str, front: FrontOf, last_event_id: Annotated[str | None, Header(max_length=200)] = None
) -> Response:
    """A story's stream from its beginning, or after the event that `Last-Event-ID` names. A browser that has the last
    event asks again and again, until it is told with 204 that nothing comes."""
    try:
        seen = Position.parse(last_event_id) if last_event_id else None
    except ValueError as error:
        raise ApiError(422, str(error), param="Last-Event-ID", code="invalid_value") from error
    state = await reading(front.store.load, story_id)
    if seen and await has_ended_for(state, seen):
        return Response(status_code=204, headers={"Cache-Control": "no-cache"})
    return EventStream(follow(front, story_id, seen), error_name="error")


@stories.delete("/v1/stories/{story_id}", status_code=204)
async def delete_story(story_id: str, front: FrontOf) -> Response:
    """Stop a story's work and remove all that is stored of it."""
    await front.coordinator.cancel(story_id)
    async with front.leases.exclusive(story_id) as lease:
        await writing(lease.store.delete, story_id)
    return Response(status_code=204)


@stories.get("/v1/stories/{story_id}/pages/{page:int}.png", response_class=Response, responses=PNG)
async def get_picture(
    story_id: str, page: int, front: FrontOf, variant: Annotated[int | None, Query(ge=0, le=MAX_VARIANTS)] = None
) -> Response:
    """The picture that is shown, or another one of those that were drawn."""

    def load() -> bytes:
        chosen = front.store.load_page(story_id, page).variant if variant is None else variant
        return front.store.load_picture(story_id, page, variant=chosen)

    return Response(await reading(load), media_type="image/png")


@stories.get(
    "/v1/stories/{story_id}/pages/{page:int}/vokens",
    response_class=Response,
    responses=document("application/octet-stream", "A safetensors file"),
)
async def get_vokens(story_id: str, page: int, front: FrontOf) -> Response:
    """What a page's picture was drawn from, as safetensors: it can be drawn again with other settings."""
    vokens = await reading(front.store.load_vokens, story_id, page)
    return Response(pack(vokens), media_type="application/octet-stream")


@stories.post("/v1/pictures", response_class=Response, responses=PNG)
async def draw_vokens(body: CreatePicture, front: FrontOf, client: ClientOf) -> Response:
    """Vokens -> a PNG. A client that goes away stops the work."""
    request = to_draw_request(body, front.config, client=client)
    if request.vokens.fingerprint != front.config.fingerprint:
        message = "vokens are of another model than the one that is served: only its own decoder may draw them"
        raise InvalidRequest("vokens", message)
    picture = await draw_alone(front, request)
    headers = {"X-Seed": str(picture.seed), **({"X-Resampled": "true"} if picture.is_resampled else {})}
    return Response(picture.png, media_type="image/png", headers=headers)


@stories.post("/v1/stories/{story_id}/cancel", response_model=StoryReply, response_model_exclude_none=True)
async def cancel_story(story_id: str, front: FrontOf) -> Response:
    """Stop a story's work; what was finished stays. A story that has ended stays as it is."""
    await front.coordinator.cancel(story_id)
    return reply(front, story_reply(await reading(front.store.load, story_id)))


@operations.get("/healthz", response_model=StatusReply)
async def is_alive() -> JSONResponse:
    """This process answers."""
    return JSONResponse({"status": "alive"})


@operations.get("/readyz", response_model=StatusReply)
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


@operations.post("/login", status_code=204)
async def log_in(body: Login, request: Request, front: FrontOf) -> Response:
    """A key for a cookie, which a browser sends by itself."""
    if front.keys is None:
        return Response(status_code=204)
    key = front.keys.find(body.key)
    if key is None:
        await asyncio.sleep(1)  # guessing must be slow
        raise ApiError(401, "this is no key of this server", param="key", code="invalid_api_key")
    is_secure = request.url.scheme == "https"
    return Response(status_code=204, headers={"Set-Cookie": session_cookie(front.keys, key, is_secure=is_secure)})


@operations.get("/", include_in_schema=False)
async def open_studio() -> FileResponse:
    headers = {"Content-Security-Policy": STUDIO_POLICY, "Cache-Control": "no-cache"}
    return FileResponse(STUDIO / "index.html", media_type="text/html", headers=headers)


@operations.get("/studio/{name}", include_in_schema=False)
async def get_studio_file(name: str) -> FileResponse:
    if name not in STUDIO_FILES:
        raise ApiError(404, f"the studio has no file {shown(name)}", code="not_found")
    return FileResponse(STUDIO / name, media_type=STUDIO_FILES[name], headers={"Cache-Control": "no-cache"})


@contextlib.asynccontextmanager
async def _look_after_stories(api: FastAPI) -> AsyncIterator[None]:
    """Resume stories that were cut off, and remove those that are too old, until the front ends."""
    front: Front = api.state.front
    tasks = [
        asyncio.create_task(front.coordinator.keep_alive()),
        asyncio.create_task(
            keep_within(front.store, front.leases, max_age_s=front.max_age_s, max_bytes=front.max_bytes)
        ),
    ]
    yield
    for task in tasks:
        task.cancel()


def create_api(front: Front) -> FastAPI:
    """The ASGI application; in Serve and in tests alike."""
    api = FastAPI(
        title="MiniGPT-5",
        description="Illustrated stories: text and pictures in one go.",
        lifespan=_look_after_stories,
    )
    api.state.front = front
    api.add_middleware(BodyLimit)
    if front.keys:
        api.add_middleware(KeyGuard, keys=front.keys, quota=front.quota)
    api.add_middleware(AccessLog)
    install_error_handlers(api)
    for router in (
        exports,
        stories,
        pages,
        images,
        chat,
        models,
        operations,
    ):  # exports first: {story_id} would take {story_id}.html
        api.include_router(router, responses=REFUSALS)
    return api


def get_host() -> str:
    """The address that this Ray's HTTP proxies bind."""
    return serve.context._get_global_client().http_config.host or ""


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
        max_age_s: float | None,
        max_bytes: float | None,
        api_keys: str,
        filters: tuple[str, ...],
        ledger: DeploymentHandle,
    ) -> None:
        add_ids_to_log()
        warn_where_unguarded()
        keys = watch_keys(api_keys or None)
        check_host(get_host(), keys)
        folder = locate(model)
        config = load_config(folder)
        self.front = build_front(
            config,
            ServeEngines(generator, decoder),
            StoryStore(storage),
            max_wait_s=max_wait_s,
            max_running=max_running,
            max_age_s=max_age_s,
            max_bytes=max_bytes,
            keys=keys,
            text_filter=TextFilter() if "text" in filters else None,
            ledger=ServeLedger(ledger),
            example_pictures=load_example_pictures(folder, config),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self.front)
