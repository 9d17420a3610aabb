"""An S3 server in a process of its own (moto), and a proxy before it that fails by a seeded plan."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.helpers.processes import ROOT, find_free_port

MOTO = ROOT / ".venv-s3" / "bin" / "moto_server"
BUCKET = "bucket"
START_S = 60.0
FAULTS = ("delay", "drop", "lost reply", "slow down", "error", "truncate")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


def variables(url: str, *, key: str = "tests") -> dict[str, str]:
    """The usual variables, of this process' environment and an endpoint."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {
        **kept,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": f"secret of {key}",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def running_s3(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Start the server with an empty bucket; its URL."""
    if not MOTO.is_file():
        pytest.skip("there is no S3 server: make install-s3")
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [MOTO, "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.put(f"{url}/{BUCKET}", trust_env=False).raise_for_status()
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "moto.log").read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@dataclass
class Faults:
    """What the proxy does to each request: with a chance of `rate`, one of `kinds`."""

    rate: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    delay_s: float = 0.3
    seed: int = 1
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self) -> str:
        with self._lock:
            kind = self._random.choice(self.kinds) if self._random.random() < self.rate else ""
            self.counts[kind] = self.counts.get(kind, 0) + 1
            return kind


@contextlib.contextmanager
def failing_s3(url: str, faults: Faults) -> Iterator[str]:
    """The URL of a proxy before the server at `url`. `faults` may change while it runs."""

    class Handler(_Handler):
        upstream, plan = url.removeprefix("http://"), faults

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    plan: Faults

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        body, fault = self._read_body(), self.plan.draw()
        if fault == "drop":
            self.close_connection = True
            return
        if fault in ("slow down", "error"):
            return self._reply(503 if fault == "slow down" else 500, {}, SLOW_DOWN if fault == "slow down" else b"")
        if fault == "delay":
            time.sleep(self.plan.delay_s)
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            reply = connection.getresponse()
            content = reply.read()
        if fault == "lost reply":
            self.close_connection = True
            return
        kept = {name: value for name, value in reply.getheaders() if name.lower() not in _OWN_HEADERS}
        self._reply(reply.status, kept, content, is_truncated=fault == "truncate")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _reply(self, status: int, headers: Mapping[str, str], content: bytes, *, is_truncated: bool = False) -> None:
        self.send_response(status)
        length = {} if any(name.lower() == "content-length" for name in headers) else {"Content-Length": len(content)}
        for name, value in {**headers, **length}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD" or status == 204:
            return
        self.wfile.write(content[: len(content) // 2] if is_truncated else content)
        self.close_connection = self.close_connection or is_truncated


_OWN_HEADERS = ("transfer-encoding", "connection", "server", "date")
