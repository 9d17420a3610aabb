"""What the routes work with, and how a route gets it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from deployments.api.errors import ApiError
from deployments.api.paths import public_path
from deployments.auth import CLIENT, Key, Keys
from deployments.engines.handles import Engines
from deployments.observability.story_context import enter_story
from deployments.schemas import shown
from deployments.stories.admission import Admission
from deployments.stories.coordinator import Coordinator
from deployments.stories.leases import Leases
from deployments.stories.ledger import Ledger, LocalLedger
from deployments.stories.relay import EventRelay
from deployments.stories.store_threads import reading
from deployments.stories.story_runner import StoryRunner
from minigpt5.config import ModelConfig
from minigpt5.errors import StoryNotFound
from minigpt5.story.safety import TextFilter
from minigpt5.story.store import STORY_ID, StoryStore


@dataclass(frozen=True)
class FrontQuota:
    """What keys have used, as one front counts it; see deployments.auth.Quota."""

    ledger: Ledger
    front: str

    async def begin(self, key: Key) -> float:
        return await self.ledger.begin(self.front, key.name, per_minute=key.per_minute, concurrent=key.concurrent)

    async def end(self, key: Key) -> None:
        await self.ledger.end(self.front, key.name)


@dataclass(frozen=True, kw_only=True)
class Front:
    """Everything behind the routes; the application holds one as `state.front`."""

    config: ModelConfig
    engines: Engines
    store: StoryStore
    admission: Admission
    leases: Leases
    runner: StoryRunner
    relay: EventRelay
    coordinator: Coordinator
    quota: FrontQuota
    max_age_s: float | None = None
    max_bytes: float | None = None
    """Largest total size of stored stories; None: all stay."""
    text_filter: TextFilter | None = None
    keys: Keys | None = None
    """None: every client may do everything."""
    example_pictures: Mapping[int, bytes] = field(default_factory=dict)
    """Number of one of the model's examples, from 1 -> its picture (WebP)."""

    def public_url(self, path: str, *, expires: int | None = None) -> str:
        """The URL in a reply: what a client asks for, signed where there are keys; see `Keys.sign_url`."""
        return public_path(self.keys.sign_url(path, expires=expires) if self.keys else path)


def build_front(
    config: ModelConfig,
    engines: Engines,
    store: StoryStore,
    *,
    max_wait_s: float,
    max_running: int,
    max_age_s: float | None = None,
    max_bytes: float | None = None,
    keys: Keys | None = None,
    text_filter: TextFilter | None = None,
    ledger: Ledger | None = None,
    example_pictures: Mapping[int, bytes] | None = None,
) -> Front:
    """`ledger`: of all fronts; None: this is the only one."""
    ledger = ledger or LocalLedger()
    admission = Admission(
        max_wait_s=max_wait_s,
        max_running=max_running,
        relative_pixels=config.relative_pixels,
        guides_in_one_call=config.guides_in_one_call,
    )
    leases = Leases(ledger, store)
    runner = StoryRunner(engines, admission, leases, config=config, text_filter=text_filter)
    relay = EventRelay(ledger, store, runner.find)
    return Front(
        config=config,
        engines=engines,
        store=store,
        admission=admission,
        leases=leases,
        runner=runner,
        relay=relay,
        coordinator=Coordinator(ledger, store, admission, leases, runner, relay),
        quota=FrontQuota(ledger, leases.front),
        max_age_s=max_age_s,
        max_bytes=max_bytes,
        keys=keys,
        text_filter=text_filter,
        example_pictures=example_pictures or {},
    )


def get_front(request: Request) -> Front:
    return request.app.state.front


FrontOf = Annotated[Front, Depends(get_front)]


def name_client(request: Request) -> str:
    """Whose request it is, for the engines to share their time: its key, or what it calls so, else its address."""
    if name := request.scope.get(CLIENT):
        return f"key-{name}"
    if key := request.headers.get("Authorization"):
        return hashlib.sha256(key.encode()).hexdigest()[:16]
    return request.client.host if request.client else ""


ClientOf = Annotated[str, Depends(name_client)]


def check_texts(front: Front, texts: Iterable[object], field: str) -> None:
    """Raises Blocked where the text filter stops one of what a client has written."""
    if front.text_filter:
        for text in texts:
            if isinstance(text, str):
                front.text_filter.check_text(text, field)


def refuse_unknown_query(request: Request) -> None:
    """A query that a route does not take would otherwise be ignored."""
    known = {param.alias for param in request.scope["route"].dependant.query_params}
    if request.app.state.front.keys:  # a signed URL may come with a key, too
        known |= {"expires", "signature"}
    for name, value in request.query_params.items():
        if name not in known:
            raise ApiError(422, f"query parameter {name[:40]} (value {shown(value)}) is unknown here", param=name[:40])


async def note_story(request: Request) -> None:
    """What a request does to a story is logged under its id."""
    story_id = request.path_params.get("story_id", "")
    if STORY_ID.fullmatch(story_id):
        enter_story(story_id)


async def check_owner(request: Request, front: FrontOf, client: ClientOf) -> None:
    """Where there are keys, a story is there for its own key alone. Raises StoryNotFound."""
    story_id = request.path_params.get("story_id")
    is_shared = request.scope.get(CLIENT, "") is None
    if not front.keys or not story_id or is_shared:
        return
    if await reading(front.store.load_owner, story_id) != client:
        raise StoryNotFound(f"no story {story_id[:80]!r}")
