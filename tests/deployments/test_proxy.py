"""The proxies' protocol: requests pass as they did, and headers have an end."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from ray.serve._private import constants
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from deployments import proxy
from deployments.proxy import (
    CALLBACK,
    CALLBACK_VARIABLE,
    MAX_HEADER_BYTES,
    OF_SERVE,
    TRUST_VARIABLE,
    BoundedProtocol,
    guard,
    warn_where_unguarded,
)
from tests.helpers.processes import find_free_port


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    body = await request.body()
    await JSONResponse({"headers": len(request.headers), "body": len(body)})(scope, receive, send)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(proxy, "HEADER_S", 0.5)
    port = find_free_port()
    server = uvicorn.Server(uvicorn.Config(echo, port=port, http=BoundedProtocol, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join(10)


def test_requests_of_any_length_pass_one_after_another(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for size in (0, 10, 5_000_000, 100_000):
            reply = client.post("/", content=b"a" * size, headers={"X": "b" * 30_000})
            assert reply.json()["body"] == size
        pieces = (b"a" * 70_000 for _ in range(20))
        assert client.post("/", content=pieces).json()["body"] == 1_400_000
        time.sleep(0.7)  # the line is quiet, which is nobody's fault
        assert client.get("/").status_code == 200


def test_headers_that_are_too_large_are_refused(port: int) -> None:
    for flood in (b"X: " + b"a" * 10 * MAX_HEADER_BYTES, b"".join(b"X-%d: a\r\n" % i for i in range(20_000)) + b"\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            answer = b""
            try:
                line.sendall(flood)
                while data := line.recv(4096):
                    answer += data
            except OSError:
                pass
            assert not answer or answer.startswith(b"HTTP/1.1 431 ")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        reply = client.get("/", headers={"X": "a" * (MAX_HEADER_BYTES + 1)})
        assert (reply.status_code, reply.json()["error"]["code"]) == (431, "headers_too_large")


def test_headers_that_come_slowly_are_waited_for_so_long(port: int) -> None:
    for begun in (b"", b"GET / HTTP/1.1\r\n"):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
            line.sendall(begun)
            assert line.recv(100) == b""
        assert 0.3 < time.monotonic() - began < 3


def test_a_proxy_takes_it_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    assert guard() == []
    config = uvicorn.Config(echo)
    config.load()
    assert config.http_protocol_class is BoundedProtocol


def test_a_client_gives_serve_no_orders(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        plain = client.get("/").json()["headers"]
        orders = {"X-Request-Timeout-Seconds": "0.1", "x-request-disconnect-disabled": "?1", "X-Other": "1"}
        assert client.get("/", headers=orders).json()["headers"] == plain + 1


@pytest.mark.parametrize(("trusted", "num_passed"), [("", 0), ("0", 0), ("1", 2)])
def test_a_client_decides_what_is_traced_only_where_it_is_trusted(
    port: int, monkeypatch: pytest.MonkeyPatch, trusted: str, num_passed: int
) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, trusted)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        plain = client.get("/").json()["headers"]
        trace = {"Traceparent": f"00-{7:032x}-{1:016x}-01", "tracestate": "a=1"}
        assert client.get("/", headers=trace).json()["headers"] == plain + num_passed


def test_serve_has_no_other_header_that_gives_orders() -> None:
    names = {value for name, value in vars(constants).items() if re.fullmatch("SERVE_HTTP_REQUEST_.*_HEADER", name)}
    assert {name.encode() for name in names - {"x-request-id"}} == set(OF_SERVE)


@pytest.mark.parametrize(("callback", "warns"), [("", True), (CALLBACK, False), ("theirs.proxy.guard", False)])
def test_a_node_without_the_guard_is_in_the_log(
    callback: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CALLBACK_VARIABLE, callback)
    warn_where_unguarded()
    assert (f"set {CALLBACK_VARIABLE}={CALLBACK} on every node" in caplog.text) == warns
