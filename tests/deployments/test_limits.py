"""Every row of the table in docs/operations.md, provoked: its default, status, code and Retry-After."""

from __future__ import annotations

import asyncio
import inspect
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from deployments import proxy
from deployments.api.errors import BODY_S, MAX_BODY_BYTES, MAX_PATH_CHARACTERS, BodyLimit
from deployments.api.routes import create_api
from deployments.application import MAX_REQUESTS, AppArgs
from deployments.auth import Key
from deployments.engines.handles import READY_TIMEOUT_S, NotReady
from deployments.proxy import HEADER_S, MAX_HEADER_BYTES, BoundedProtocol
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.errors import EngineFull, EngineLost
from tests.deployments.test_auth import Guarded
from tests.helpers.processes import ROOT, find_free_port
from tests.helpers.served import Listening, Served

STORY = {"prompt": "A fox", "pages": 1}
FLOOD = "requests of a front, streams included"
"""Provoked in test_flood.py, on a real Serve."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    limit: str
    set_by: str
    default: str
    answer: str
    retry_after: str
    answered_by: str


def rows() -> dict[str, Row]:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Limits\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {row[0]: Row(*row) for row in cells[2:]}


def raises(failure: Exception) -> Callable[..., Any]:
    async def fail(*_: object) -> NoReturn:
        raise failure

    return fail


class At:
    """Where the limits are provoked."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch

    def long_headers(self) -> httpx.Response:
        listening = Listening(Served(self.folder), port := find_free_port(), http=BoundedProtocol)
        reply = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"X": "a" * MAX_HEADER_BYTES}, trust_env=False)
        listening.stop()
        return reply

    def slow_headers(self) -> None:
        self.patch.setattr(proxy, "HEADER_S", 0.2)
        listening = Listening(Served(self.folder), port := find_free_port(), http=BoundedProtocol)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
            line.sendall(b"GET / HTTP/1.1\r\n")
            assert line.recv(100) == b""
        listening.stop()

    def long_path(self) -> httpx.Response:
        return Served(self.folder).request("GET", "/" + "a" * MAX_PATH_CHARACTERS)

    def large_body(self) -> httpx.Response:
        return Served(self.folder).request("POST", "/v1/stories", content=b" " * (MAX_BODY_BYTES + 1))

    def slow_body(self) -> httpx.Response:
        async def never() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(60)

        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(BodyLimit(create_api(Served(self.folder).front), body_s=0.05))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/v1/stories", content=never())

        return asyncio.run(post())

    def bad_field(self) -> httpx.Response:
        served = Served(self.folder)
        assert served.post({"prompt": "A fox", "n": 99}, "/v1/images/generations").status_code == 400
        return served.post({**STORY, "pages": 99})

    def fast_key(self) -> httpx.Response:
        guarded = Guarded(self.folder, per_minute=1)
        assert guarded.request("POST", "/v1/stories", json=STORY, headers=guarded.alice).status_code == 201
        return guarded.request("POST", "/v1/stories", json=STORY, headers=guarded.alice)

    def busy_key(self) -> httpx.Response:
        guarded = Guarded(self.folder, concurrent=1)
        return self._beside_a_story(guarded, guarded.alice)

    def many_running(self) -> httpx.Response:
        return self._beside_a_story(Served(self.folder, max_running=1))

    def long_wait(self) -> httpx.Response:
        return self._beside_a_story(Served(self.folder, max_wait_s=0.01))

    def full_engine(self) -> httpx.Response:
        served = Served(self.folder)
        self.patch.setattr(
            served.front.engines, "validate_request", raises(EngineFull("the decoder takes at most 512"))
        )
        return served.post(STORY)

    def lost_engine(self) -> httpx.Response:
        served = Served(self.folder)
        self.patch.setattr(served.front.engines, "validate_request", raises(EngineLost("an engine's process died")))
        return served.post(STORY)

    def silent_engine(self) -> httpx.Response:
        served = Served(self.folder)
        self.patch.setattr(served.front.engines, "check_ready", raises(NotReady("DiffusionDecoder does not answer")))
        return served.request("GET", "/readyz")

    @staticmethod
    def _beside_a_story(served: Served, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """The answer to a story while another one is written."""
        replies: list[httpx.Response] = []

        async def use(client: httpx.AsyncClient) -> None:
            served.generator.gate.clear()
            first = asyncio.create_task(client.post("/v1/stories", json=STORY, headers=headers))
            while not served.generator.requests:
                await asyncio.sleep(0.01)
            replies.append(await client.post("/v1/stories", json=STORY, headers=headers))
            served.generator.gate.set()
            assert (await first).status_code == 201

        served.run(use)
        return replies[0]


def max_jobs() -> str:
    (default,) = {
        inspect.signature(engine).parameters["max_jobs"].default for engine in (DiffusionDecoder, VokenGenerator)
    }
    return f"{default}"


ARGS = AppArgs(model="")
PROVOKED: dict[str, tuple[str, Callable[[At], httpx.Response | None]]] = {
    "headers of a request": (f"{MAX_HEADER_BYTES // 2**10} KiB", At.long_headers),
    "time for the headers": (f"{HEADER_S:g} s", At.slow_headers),
    "path of a request": (f"{MAX_PATH_CHARACTERS} characters", At.long_path),
    "body of a request": (f"{MAX_BODY_BYTES // 2**20} MiB", At.large_body),
    "time for the body": (f"{BODY_S:g} s", At.slow_body),
    "values of fields": ("by field", At.bad_field),
    "requests of a key in a minute": (f"{Key.per_minute}", At.fast_key),
    "requests of a key at once": (f"{Key.concurrent}", At.busy_key),
    "stories and picture requests at once": (f"{ARGS.max_running}", At.many_running),
    "predicted time of a request": (f"{ARGS.max_wait_s:g} s", At.long_wait),
    "requests at an engine's replica": (max_jobs(), At.full_engine),
    "an engine whose process died": ("none", At.lost_engine),
    "an engine that does not answer `/readyz`": (f"{READY_TIMEOUT_S:g} s", At.silent_engine),
}
"""Limit -> its default in the code, and how it is reached."""


def test_every_row_is_provoked() -> None:
    assert rows().keys() == {*PROVOKED, FLOOD}
    assert rows()[FLOOD].default == f"{MAX_REQUESTS} run and {MAX_REQUESTS} wait"


@pytest.mark.parametrize("limit", PROVOKED)
def test_a_limit_answers_as_its_row_says(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, (default, provoke) = rows()[limit], PROVOKED[limit]
    assert row.default == default
    if (name := row.set_by.partition("`")[2].partition("`")[0]) and (file := re.search(r"`([\w/]+\.py)`", row.set_by)):
        assert re.search(rf"^{name}\b", (ROOT / file[1]).read_text(), flags=re.M)
    reply = provoke(At(tmp_path, monkeypatch))
    if reply is None:
        assert row.answer == "the connection ends"
        return
    assert row.answer.startswith(f"{reply.status_code} `{reply.json()['error']['code']}`")
    after = reply.headers.get("Retry-After")
    assert (after is None) == (row.retry_after == "no")
    if row.retry_after.isdecimal():
        assert after == row.retry_after
    elif after is not None:
        assert int(after) >= 1
