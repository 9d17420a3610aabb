"""The front over fake engines, and a client of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import sse
from deployments.api.front import Front, build_front
from deployments.api.routes import create_api
from deployments.auth import Keys
from deployments.stories import store_threads
from deployments.stories.ledger import Ledger
from minigpt5.config import ModelConfig, storybook
from minigpt5.story.safety import TextFilter
from minigpt5.story.store import StoryStore
from minigpt5.types import DrawSettings, Vokens
from tests.helpers.fakes import FINGERPRINT, FakeDecoder, FakeGenerator, LocalEngines

CONFIG = dataclasses.replace(
    storybook(), image_px=16, fingerprint=FINGERPRINT, draw=DrawSettings(steps=3, guidance_scale=2.5)
)
VOKENS = Vokens(page=1, hidden_VH=np.zeros((8, 4), np.float32), fingerprint=FINGERPRINT)
Use = Callable[[httpx.AsyncClient], Awaitable[None]]


@contextlib.asynccontextmanager
async def alive(*fronts: Served) -> AsyncIterator[None]:
    """Fronts that beat."""
    watches = [asyncio.create_task(served.front.coordinator.keep_alive()) for served in fronts]
    try:
        yield
    finally:
        for watch in watches:
            watch.cancel()


class Served:
    """The front over fakes, and a client of it."""

    def __init__(
        self,
        storage: Path,
        *,
        generator: FakeGenerator | None = None,
        decoder: FakeDecoder | None = None,
        max_wait_s: float = 60,
        max_running: int = 4,
        keys: Keys | None = None,
        ledger: Ledger | None = None,
        text_filter: TextFilter | None = None,
        config: ModelConfig = CONFIG,
        example_pictures: Mapping[int, bytes] | None = None,
    ) -> None:
        self.generator, self.decoder = generator or FakeGenerator(), decoder or FakeDecoder()
        self.store = StoryStore(str(storage))
        engines = LocalEngines(self.generator, self.decoder)
        self.front: Front = build_front(
            config,
            engines,
            self.store,
            max_wait_s=max_wait_s,
            max_running=max_running,
            keys=keys,
            text_filter=text_filter,
            ledger=ledger,
            example_pictures=example_pictures,
        )

    def run(self, use: Use) -> None:
        async def main() -> None:
            transport = httpx.ASGITransport(create_api(self.front), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await use(client)

        asyncio.run(main())

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        replies: list[httpx.Response] = []

        async def use(client: httpx.AsyncClient) -> None:
            replies.append(await client.request(method, path, **kwargs))

        self.run(use)
        return replies[0]

    def post(self, body: object, path: str = "/v1/stories") -> httpx.Response:
        return self.request("POST", path, json=body)


def let_writers_end() -> None:
    """Wait for the store's threads. They end with a process that dies; here they would write beside the next front."""
    writers = store_threads._WRITERS
    together = threading.Barrier(store_threads.NUM_THREADS + 1)
    for _ in range(store_threads.NUM_THREADS):
        writers.submit(together.wait)
    together.wait(timeout=60)


def under(prefix: str, app: ASGIApp, *, is_known: bool) -> ASGIApp:
    """An application as Serve's `route_prefix` puts it; not `is_known`: as a proxy does that takes a prefix away."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            assert path.startswith(prefix), f"{path} is not under {prefix}"
            scope = {**scope, **({"root_path": prefix} if is_known else {"path": path.removeprefix(prefix)})}
        await app(scope, receive, send)

    return answer


class Listening:
    """A front on a socket, which may be cut off and come back."""

    def __init__(
        self, served: Served, port: int, *, put: Callable[[ASGIApp], ASGIApp] = lambda app: app, **options: Any
    ) -> None:
        """`put`: the application elsewhere than at "/". `options`: of uvicorn."""
        options = {"log_level": "error", "timeout_graceful_shutdown": 0, **options}
        self.server = uvicorn.Server(uvicorn.Config(put(create_api(served.front)), port=port, **options))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


def read_events(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(id, event, data) of each server-sent event."""
    return [(event.id, event.name, json.loads(event.data)) for event in sse.read_events([text.encode()])]


def assert_error(reply: httpx.Response, status: int, *, param: str | None = None, says: tuple[str, ...] = ()) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert error["param"] == param
    for words in says:
        assert words in error["message"]


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
