"""More requests than a front takes, on a real Serve: Serve refuses them before our code, and the server lives on."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx
import pytest

from deployments.application import MAX_REQUESTS
from deployments.client import Client, ClientError
from tests.deployments.test_limits import FLOOD, rows
from tests.helpers.processes import MODEL, Server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}"),
]

BEGUN = b"POST /v1/stories HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
"""Headers of a request whose body never comes: it takes a place at the front."""
SPARE = 100
"""Lines that are refused as well."""
TIMEOUT_S = 90
"""Shorter than BODY_S, after which the first lines give up their places."""


def test_what_a_front_cannot_take_is_refused_by_serve(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows()[FLOOD]
    with contextlib.ExitStack() as lines:
        for _ in range(2 * MAX_REQUESTS + SPARE):
            line = lines.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            line.sendall(BEGUN)
        refused = wait_for_refusal(server)
        assert row.answer.startswith(f"{refused.status_code} ")
        assert refused.headers["Retry-After"] == row.retry_after
        assert refused.text.startswith("Request dropped due to backpressure")
        monkeypatch.setattr("deployments.client.PATIENCE_S", 1.0)
        with Client(f"http://127.0.0.1:{server.port}") as client:
            with pytest.raises(ClientError, match="^503 Request dropped due to backpressure") as refusal:
                client.story("story_1")
            assert (refusal.value.status, refusal.value.retry_after_s) == (503, 5)
    monkeypatch.undo()
    with Client(f"http://127.0.0.1:{server.port}") as client, pytest.raises(ClientError, match="no story"):
        client.story("story_1")  # the places are free once the proxy has seen that the lines are gone
    assert server.client.post("/v1/stories", json={"prompt": "A fox", "pages": 1, "steps": 2}).status_code == 201


def wait_for_refusal(server: Server) -> httpx.Response:
    """The first 503: the proxy needs a while to read the lines."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.ReadTimeout):  # it took one of the last places in the queue
            reply = httpx.get(f"http://127.0.0.1:{server.port}/healthz", timeout=2, trust_env=False)
            if reply.status_code == 503:
                return reply
    raise AssertionError("nothing was refused")
