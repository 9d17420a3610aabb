"""What the routes work with, and how a route gets it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from deployments.admission import Admission
from deployments.engines import Engines
from deployments.registry import Registry
from minigpt5.config import ModelConfig
from minigpt5.store import StoryStore


@dataclass(frozen=True, kw_only=True)
class Front:
    """Everything behind the routes; the application holds one as `state.front`."""

    config: ModelConfig
    engines: Engines
    store: StoryStore
    admission: Admission
    registry: Registry


def build_front(
    config: ModelConfig, engines: Engines, store: StoryStore, *, max_wait_s: float, max_running: int
) -> Front:
    admission = Admission(max_wait_s=max_wait_s, max_running=max_running)
    registry = Registry(engines, store, admission, model=config.name)
    return Front(config=config, engines=engines, store=store, admission=admission, registry=registry)


def get_front(request: Request) -> Front:
    return request.app.state.front


FrontOf = Annotated[Front, Depends(get_front)]


def name_client(request: Request) -> str:
    """Whose request it is, for the engines to share their time: the key that it comes with, else its address."""
    if key := request.headers.get("Authorization"):
        return hashlib.sha256(key.encode()).hexdigest()[:16]
    return request.client.host if request.client else ""


ClientOf = Annotated[str, Depends(name_client)]
